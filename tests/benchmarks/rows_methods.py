"""Every method beside LoRA: bytes kept for the backward, a training step, and putting it into many layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.benchmarks.harness import Measure, Row, Size, library, timed
from tests.benchmarks.models import Chain, layers, smollm2_layers
from tests.benchmarks.rows_saved_bytes import TARGETS, saved_bytes
from tests.benchmarks.rows_step import step

METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "C3A": ("C3AConfig", {"block_size": 4}, 1.02),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 200}, 0.3),
    "HiRA": ("HiraConfig", {"r": 8}, 0.3),
    "HRA": ("HRAConfig", {"r": 8}, 0.05),
    "(IA)³": ("IA3Config", {"feedforward_modules": []}, 1.02),
    "LoHa": ("LoHaConfig", {"r": 8, "alpha": 16}, 0.3),
    "LoKr": ("LoKrConfig", {"r": 2}, 0.3),
    "MiSS": ("MissConfig", {"r": 16}, 1.02),
    "OFT": ("OFTConfig", {"oft_block_size": 4}, 0.96),
    "VeRA": ("VeraConfig", {"r": 64}, 1.02),
}
"""Label -> config class, its fields, and the most of the rival's bytes that ours may keep."""
STEP_TARGET, INJECT_TARGET = 1.05, 0.2


def with_method(name: str, label: str, model: nn.Module, targets: list[str]) -> Any:
    """The model with an adapter of a method, in the midst of a training."""
    source = library(name)
    config, fields, _ = METHODS[label]
    wrapped = source.get_peft_model(model, getattr(source, config)(target_modules=targets, **fields))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return wrapped.train()


def saved(label: str) -> Callable[[str, Size], Measure]:
    """Four layers of SmolLM2 with the method on all their linear layers."""

    def prepare(name: str, size: Size) -> Measure:
        model = with_method(name, label, smollm2_layers(size.hidden, torch.float32), TARGETS)
        inputs = torch.randn(1, size.sequence, size.hidden).requires_grad_()
        return lambda: saved_bytes(lambda: model(inputs_embeds=inputs).last_hidden_state)

    return prepare


def one_step(label: str) -> Callable[[str, Size], Measure]:
    """Forward and backward of one wide layer in float32."""

    def prepare(name: str, size: Size) -> Measure:
        width = size.wide // 2
        return step(with_method(name, label, layers(width), ["proj"]), size.tokens, width, torch.float32)

    return prepare


def inject(label: str) -> Callable[[str, Size], Measure]:
    """``get_peft_model`` on a fresh model of many layers."""

    def prepare(name: str, size: Size) -> Measure:
        source, (config, fields, _) = library(name), METHODS[label]

        def measure() -> float:
            model = Chain(size.modules, 2 * size.small)
            settings = getattr(source, config)(target_modules=["proj"], **fields)
            return timed(lambda: source.get_peft_model(model, settings))

        return measure

    return prepare


def _row_name(label: str) -> str:
    return label.strip("()³").replace(")", "").lower()


ROWS = [
    *(
        Row(
            f"method-saved-{_row_name(label)}",
            f"saved for backward, fp32, {label}",
            "bytes",
            target,
            saved(label),
            repeats=1,
        )
        for label, (_, _, target) in METHODS.items()
    ),
    *(
        Row(
            f"method-step-{_row_name(label)}",
            f"{label} step, fp32, d = 1,024, 256 tokens",
            "seconds",
            STEP_TARGET,
            one_step(label),
        )
        for label in METHODS
    ),
    *(
        Row(
            f"method-inject-{_row_name(label)}",
            f"inject {label}, 1,001 Linear",
            "seconds",
            INJECT_TARGET,
            inject(label),
            repeats=3,
        )
        for label in METHODS
    ),
]
