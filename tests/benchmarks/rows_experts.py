"""A mixture of experts of which few are reached: Qwen3-MoE's shape, four of 64 experts for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeModel

from tests.benchmarks.harness import Measure, Row, Size, timed
from tests.benchmarks.models import adapted
from tests.benchmarks.rows_saved_bytes import saved_bytes

_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(size: Size, way: str) -> nn.Module:
    """Two frozen layers; as many experts as ``size`` has modules, at most 64."""
    config = Qwen3MoeConfig(
        **{"hidden_size": size.hidden, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "vocab_size": 100, "moe_intermediate_size": size.hidden // 3, "intermediate_size": 64},
        **{"num_experts": min(64, size.modules), "num_experts_per_tok": 4},
    )
    model: Any = Qwen3MoeModel(config).requires_grad_(False)
    model.set_experts_implementation(way)
    return model  # type: ignore[no-any-return]


def with_experts(name: str, size: Size, way: str = "grouped_mm") -> nn.Module:
    """The mixture with LoRA on its experts alone."""
    found: nn.Module = adapted(name, mixture(size, way), r=8, target_modules=[], target_parameters=_EXPERTS)
    return found


def inputs(size: Size, tokens: int) -> Tensor:
    """Embeddings that take a gradient, so that the base's own backward counts on all sides."""
    return torch.randn(1, tokens, size.hidden).requires_grad_()


def step(model: nn.Module, size: Size) -> Measure:
    """Forward and backward of few tokens."""
    x = inputs(size, size.few_tokens)
    return lambda: timed(lambda: model(inputs_embeds=x).last_hidden_state.sum().backward())


def decode(model: nn.Module, size: Size) -> Measure:
    """Forward of one token."""
    x = inputs(size, 1)

    def once() -> None:
        with torch.no_grad():
            model(inputs_embeds=x)

    return lambda: timed(once)


def saved(model: nn.Module, size: Size) -> Measure:
    """Bytes that the forward keeps for the backward."""
    x = inputs(size, size.few_tokens)
    return lambda: saved_bytes(lambda: model(inputs_embeds=x).last_hidden_state)


def row(name: str, title: str, target: float, measured: Callable[[nn.Module, Size], Measure], way: str) -> Row:
    """A row over the frozen mixture."""
    return Row(
        name,
        title,
        "bytes" if measured is saved else "seconds",
        target,
        lambda library, size: measured(with_experts(library, size, way), size),
        floor=lambda size: measured(mixture(size, way), size),
    )


ROWS = [
    row(
        "experts-step",
        "LoRA on 64 experts, four to a token, a step of 16 tokens over the frozen base",
        0.25,
        step,
        "grouped_mm",
    ),
    row("experts-decode", "the same, a decode step", 0.25, decode, "grouped_mm"),
    row("experts-saved", "the same, saved for backward", 0.1, saved, "grouped_mm"),
    row("experts-loop", "the same, a step with transformers' loop over experts", 0.25, step, "eager"),
]
