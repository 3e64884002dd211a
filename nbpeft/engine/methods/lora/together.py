"""What the layers of an adapter share without tensors: its config, and each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from nbpeft.engine.adapter import SharedState


class Together(SharedState):
    """Knows the adapters of all layers, for what is computed over all of them.

    Args:
        config: of the adapter.

    Attributes:
        adapters: path -> the adapter of a layer.
    """

    adapters: dict[str, Any]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        # Each adapter is a module of its layer.
        self.__dict__.update(config=config, adapters={})

    @classmethod
    def tensor_shapes(cls, config: Any, features: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """It has no tensors."""
        return {}

    @classmethod
    def create(
        cls,
        config: Any,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, Tensor] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """Starts without any adapter."""
        return cls(config)

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """A file holds nothing of it."""
        return False
