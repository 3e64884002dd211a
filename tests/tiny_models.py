"""The tiny models and adapters of all tests, and whether anything of them changed."""

from __future__ import annotations

from typing import Any

import torch
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
