"""Time of one training step, forward and backward, on one layer; and of an optimizer's step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.benchmarks.harness import PEFT, Measure, Row, Size, timed
from tests.benchmarks.models import adapted, layers


def step(model: nn.Module, tokens: int, width: int, dtype: torch.dtype) -> Measure:
    """Forward and backward, with a gradient for the input as inside a network."""
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, width).to(dtype)

    def once() -> None:
        model(x).backward(upstream)

    return lambda: timed(once, times=3)


def lora(dropout: float) -> Callable[[str, Size], Measure]:
    """A LoRA step in bf16."""

    def prepare(name: str, size: Size) -> Measure:
        model = adapted(name, layers(size.wide, torch.bfloat16), lora_dropout=dropout)
        return step(model, size.tokens, size.wide, torch.bfloat16)

    return prepare


def frozen(size: Size) -> Measure:
    """The same layer without an adapter."""
    return step(layers(size.wide, torch.bfloat16), size.tokens, size.wide, torch.bfloat16)


def few_tokens(**fields: Any) -> Callable[[str, Size], Measure]:
    """A step in fp32 on few tokens."""

    def prepare(name: str, size: Size) -> Measure:
        return step(adapted(name, layers(size.wide), **fields), size.few_tokens, size.wide, torch.float32)

    return prepare


def lora_fa(name: str, size: Size) -> Measure:
    """``LoraFAOptimizer.step`` on the gradients that one step left."""
    model = adapted(name, layers(16 * size.small, count=size.modules // 5))
    home = "peft.optimizers" if name == PEFT else name
    create: Callable[..., torch.optim.Optimizer] = importlib.import_module(home).create_lorafa_optimizer
    optimizer = create(model, r=16, lora_alpha=32, lr=1e-4)
    model(torch.randn(size.few_tokens, 16 * size.small)).sum().backward()
    return lambda: timed(optimizer.step)


STEP = "step, bf16, d = 2048, 256 tokens, over the frozen base"
ROWS = [
    Row("step", f"LoRA {STEP}", "seconds", 0.5, lora(0.0), frozen, repeats=21),
    Row("step-dropout", f"LoRA {STEP}, dropout", "seconds", 0.9, lora(0.1), frozen, repeats=21),
    Row("step-dora", "DoRA step, d = 2048, 16 tokens", "seconds", 0.35, few_tokens(use_dora=True)),
    Row("lora-fa", "LoRA-FA optimizer step, 200 modules", "seconds", 0.3, lora_fa),
]
