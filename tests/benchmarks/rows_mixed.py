"""One batch whose rows are served by different adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.harness import Measure, Row, Size, timed
from tests.benchmarks.models import layers, with_adapters

_STEPS = 32


class Decoder(nn.Module):
    """Layers whose ``generate`` runs them once for each step, as decoding one token at a time does."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = layers(size.wide, count=size.wide_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    @torch.no_grad()
    def generate(self, x: Tensor) -> Tensor:
        for _ in range(_STEPS):
            x = self(x)
        return x


def served(name: str, size: Size) -> tuple[Any, Tensor, dict[str, list[str]]]:
    """A model with ``size.batch_adapters`` adapters, a batch, and the name of each row's adapter."""
    model = with_adapters(name, Decoder(size), size.batch_adapters, r=16, init_lora_weights=False)
    x = torch.randn(size.batch, 1, size.wide)
    return model.eval(), x, {"adapter_names": [f"a{row % size.batch_adapters}" for row in range(size.batch)]}


def decode(name: str, size: Size) -> Measure:
    """One step of a generation, with its share of what the call prepares."""
    model, x, rows = served(name, size)
    return lambda: timed(lambda: model.generate(x, **rows)) / _STEPS


def call(name: str, size: Size) -> Measure:
    """One forward on its own."""
    model, x, rows = served(name, size)

    def once() -> None:
        with torch.no_grad():
            model(x, **rows)

    return lambda: timed(once)


ROWS = [
    Row("mixed-decode", "32 adapters in a batch of 32, a decode step, 4 layers, d = 2,048", "seconds", 0.65, decode),
    Row("mixed-call", "the same, one forward on its own", "seconds", 1.0, call),
]
