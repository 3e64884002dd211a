"""Where an adapter of a layer is built, and what makes its new parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter_weights import TakenOver
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.initial_draws import Fill, drawn, dtype_in_layer
from nbpeft.engine.contract.shared_state import SharedState


@dataclass(frozen=True)
class AdapterSite:
    """Where an adapter is built.

    Attributes:
        path: of the layer in the base model; patterns are matched against it.
        base: the layer.
        shapes: what ``parameter_shapes`` gave for it.
        dtype: dtype of new parameters.
        shared: the state that the adapter shares with those of other layers, where its method has one.
        name: of the adapter; for layers of somebody else's class, which go by it.
        start: the part of the weight that it takes over, where that is known already.
    """

    path: str
    base: BaseLayer
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    shared: SharedState | None = None
    name: str = "default"
    start: TakenOver | None = None

    @cached_property
    def device(self) -> torch.device:
        """Where the layer is, and its parameters go."""
        return self.base.device

    def new(self, shape: Sequence[int], fill: Fill | None = None) -> Tensor:
        """A new tensor, on the device of the layer and in the dtype of new parameters.

        Args:
            shape: of the tensor.
            fill: fills it with random numbers, see ``initial_draws``; None for zeros.
        """
        if fill is None:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        return drawn(shape, fill, self.device, self.dtype, dtype_in_layer(self.base))
