"""The layer that an adapter is built for, and how its new parameters are created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter_weights import InitialComponent
from nbpeft.engine.contract.base import BaseLayer, Shape
from nbpeft.engine.contract.initial_draws import Fill, drawn, dtype_in_layer
from nbpeft.engine.contract.shared_state import SharedState
from nbpeft.errors import ConfigError


@dataclass(frozen=True)
class AdapterSite:
    """The layer that an adapter is built for.

    Attributes:
        path: path of the layer in the base model; patterns are matched against it.
        base: the layer.
        shapes: parameter name -> shape, as ``parameter_shapes`` returned for this layer.
        dtype: dtype of new parameters.
        shared: the state that the adapter shares with those of other layers; None if its method has none.
        name: name of the adapter; needed by custom layer classes, which store their tensors under it.
        start: the part of the weight that the adapter is initialized from, if it is known already.
    """

    path: str
    base: BaseLayer
    shapes: Mapping[str, Shape]
    dtype: torch.dtype
    shared: SharedState | None = None
    name: str = "default"
    start: InitialComponent | None = None

    @cached_property
    def device(self) -> torch.device:
        """The device of the layer, and so of its new parameters."""
        return self.base.device

    def new(self, shape: Sequence[int], fill: Fill | None = None) -> Tensor:
        """A new tensor, on the device of the layer and in the dtype of new parameters.

        Args:
            shape: shape of the tensor.
            fill: fills it with random numbers in place, see ``initial_draws``; None for zeros.

        Returns:
            The tensor.
        """
        if fill is None:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        return drawn(shape, fill, self.device, self.dtype, dtype_in_layer(self.base))

    def checked(self, tensors: Any, adapter_class: type[Any]) -> Mapping[str, Tensor]:
        """Returns the tensors of a new adapter.

        Args:
            tensors: what ``initial_tensors`` returned.
            adapter_class: the class that it belongs to.

        Raises:
            ConfigError: a parameter has no tensor, or one of another shape.
        """
        for name, shape in self.shapes.items():
            tensor = tensors.get(name) if isinstance(tensors, Mapping) else None
            if not isinstance(tensor, Tensor) or tensor.shape != tuple(shape):
                given = f"a tensor of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else "none"
                raise ConfigError(
                    f"{self.path}: {adapter_class.__name__}.initial_tensors returns {given} for {name!r}; expected "
                    f"shape {tuple(shape)}"
                )
        return dict(tensors)
