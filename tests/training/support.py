"""A tiny Llama with an adapter to train, rows for it, and a clock that the test moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.tiny_models import VOCABULARY, adapted, llama

torch.set_num_threads(1)


def trainable(base: nn.Module | None = None, name: str = "default", **config: Any) -> Any:
    """A model with an adapter as training starts it."""
    base = base if base is not None else llama()
    torch.manual_seed(1)
    return adapted(base, name, **{"init_lora_weights": True} | config).train()


def token_rows(count: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def weights(model: Any, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """What trains, or what belongs to one adapter."""
    parts = dict(model.named_parameters())
    chosen = [
        name for name, part in parts.items() if (part.requires_grad if adapter is None else f".{adapter}." in name)
    ]
    return {name: parts[name].detach().clone() for name in chosen}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
