"""The tiny models and adapters of all tests, and whether anything of them changed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from nbpeft.model import LoraConfig, PeftModel, get_peft_model

VOCABULARY = 97
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "attention_bias": True,
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).to(dtype).eval()


def classifier(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA | {"pad_token_id": 0, "num_labels": 3} | changes)).eval()


def gpt2(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes | changes)).eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def config(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**settings | changes)


def adapted(base: nn.Module | None = None, name: str = "default", **changes: Any) -> PeftModel:
    """A model with an adapter that changes what it gives, unless ``changes`` says otherwise."""
    return get_peft_model(base if base is not None else llama(), config(**changes), name).eval()


def randomize(model: Any, name: str = "default", seed: int = 0, scale: float = 0.3) -> None:
    """Draws every tensor of an adapter from a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.manager.parameters(name):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens() if ids is None else ids).logits


def logits_of_each(model: Any) -> dict[str, Tensor]:
    """The logits of each adapter of a model, in evaluation; the last by name stays active."""
    found = {}
    for name in sorted(model.peft_config):
        model.set_adapter(name)
        found[name] = logits(model.eval())
    return found


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether activations are checkpointed; the property of transformers has another name in each version."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model holds."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def same_state(first: Any, second: Any) -> bool:
    """Whether two dictionaries of tensors and other values, nested or not, are equal bit by bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return bool(first == second)


MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
        | {"qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
    ),
    "llama4": (
        "Llama4Text",
        {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 1},
    ),
}
"""Mixtures whose experts are one 3-D parameter each, by model type: start of their class, and their settings."""


def mixture(model_type: str, way: str = "eager", **changes: Any) -> Any:
    """A tiny mixture of experts.

    Args:
        model_type: one of ``MIXTURES``.
        way: how its experts compute: eager, grouped_mm or batched_mm.
        **changes: of its settings.
    """
    name, own = MIXTURES[model_type]
    torch.manual_seed(0)
    settings = {**LLAMA, "intermediate_size": 48, "attention_bias": False, **own, **changes}
    built: Any = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    model = built(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # some experts and routers start at zero
                parameter.normal_(std=0.1)
    if way != "eager":
        model.set_experts_implementation(way)
    return model


def experts_of(model_type: str) -> list[str]:
    """Names of the parameters of the experts."""
    block = "feed_forward" if model_type == "llama4" else "mlp"
    return [f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"]
