"""Activations and norms that are computed again in backward: what is kept, what comes out, and that nothing stays."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation

from nbpeft.engine.selective_recompute import selective_recompute
from nbpeft.memory.saved import SavedTensors
from nbpeft.model import LoraConfig, get_peft_model
from tests.tiny_models import VOCABULARY, llama, tokens

ROWS, LENGTH, HIDDEN, WIDE = 2, 8, 32, 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "CausalLM", GROUPED),
    "mistral": ("Mistral", "CausalLM", GROUPED),
    "qwen2": ("Qwen2", "CausalLM", GROUPED),
    "qwen3": ("Qwen3", "CausalLM", HEADED),
    "gemma": ("Gemma", "CausalLM", HEADED),
    "gemma2": ("Gemma2", "CausalLM", HEADED),
    "gemma3": ("Gemma3Text", "CausalLM", HEADED),
    "phi": ("Phi", "CausalLM", COMMON),
    "phi3": ("Phi3", "CausalLM", GROUPED),
    "olmo2": ("Olmo2", "CausalLM", GROUPED),
    "cohere": ("Cohere", "CausalLM", GROUPED),
    "gpt_neox": ("GPTNeoX", "CausalLM", COMMON),
    "gpt2": ("GPT2", "LMHeadModel", COMMON | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("OPT", "CausalLM", COMMON | {"ffn_dim": WIDE, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}),
    "bloom": ("Bloom", "CausalLM", COMMON | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon": ("Falcon", "CausalLM", COMMON | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "alibi": False}),
    "mixtral": ("Mixtral", "CausalLM", EXPERTS | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", "CausalLM", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": WIDE}),
    "t5": ("T5", "ConditionalGeneration", COMMON | {
        "d_model": HIDDEN, "d_ff": WIDE, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    }),
}  # fmt: skip


def base_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, task, settings = MODELS[name]
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config" if kind != "Gemma3Text" else "Gemma3TextConfig")
    model_class = getattr(transformers, f"{kind.removesuffix('Text')}For{task}" if kind != "GPT2" else "GPT2LMHeadModel")
    return model_class(config_class(**settings)).to(dtype)


def with_lora(base: Any, **fields: Any) -> Any:
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**settings)).train()


def step(model: Any, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of one step, dropout masks drawn from a seed."""
    torch.manual_seed(2)
    ids = tokens(ROWS, LENGTH) if ids is None else ids
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach(), gradients


def kept_bytes(model: Any) -> int:
    """What a step keeps for backward, its head and loss included."""
    ids = tokens(ROWS, LENGTH)
    with SavedTensors(model) as saved:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    model.zero_grad()
    return saved.peak


def assert_equal_steps(model: Any, *, gradients: float = 1e-5) -> None:
    plain_logits, plain = step(model)
    with selective_recompute(model):
        logits, found = step(model)
    assert torch.equal(logits, plain_logits)
    assert found.keys() == plain.keys() and found
    for name, gradient in plain.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (found[name] - gradient).abs().max() <= gradients * scale, name


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_and_keeps_less(name: str) -> None:
    model = with_lora(base_model(name))
    assert_equal_steps(model)
    plain = kept_bytes(model)
    with selective_recompute(model):
        assert own_forwards(model)
        assert kept_bytes(model) < plain
    assert not own_forwards(model)
