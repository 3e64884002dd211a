"""Inputs and results of combining adapters, for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.errors import AdapterError


@dataclass(frozen=True)
class Member:
    """One adapter on one layer.

    Attributes:
        adapter: the adapter.
        base: the layer.
        tensors: parameter name -> tensor, as saved.
        scale: factor on its delta.
    """

    adapter: Adapter
    base: BaseLayer
    tensors: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class Loss:
    """Distance between the delta of a combination, K, and the true weighted sum of deltas, T.

    Attributes:
        true: squared Frobenius norm of T.
        kept: squared Frobenius norm of K.
        error: squared Frobenius norm of T - K.
        overlap: inner product of T and K.
    """

    true: float = 0.0
    kept: float = 0.0
    error: float = 0.0
    overlap: float = 0.0

    @property
    def relative_error(self) -> float:
        """‖T - K‖ / ‖T‖; 0 when both are zero, infinite when only T is."""
        if self.true > 0:
            return math.sqrt(self.error / self.true)
        return math.inf if self.kept > 0 else 0.0

    @property
    def energy_kept(self) -> float:
        """Share of ‖T‖² that lies along K, in [0, 1]; for a truncated SVD the energy of the kept singular values."""
        if self.true > 0 and self.kept > 0:
            return min(max(self.overlap, 0.0) ** 2 / (self.true * self.kept), 1.0)
        return 1.0 if self.true == self.kept else 0.0

    @classmethod
    def between(cls, true: Tensor, kept: Tensor) -> Loss:
        """Measures the loss of a delta ``kept`` against ``true``, two tensors of the same shape."""
        whole, part, missed = (float(torch.linalg.vector_norm(delta)) ** 2 for delta in (true, kept, true - kept))
        return cls(whole, part, missed, float((true * kept).sum()))

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.true + other.true, self.kept + other.kept, self.error + other.error, self.overlap + other.overlap
        )


@dataclass(frozen=True)
class Combination:
    """The new adapter that a combination results in.

    Attributes:
        config: its config.
        tensors: path -> parameter name -> tensor.
        combination_type: how it was computed.
        losses: path -> distance to the true weighted delta; None if that needs the frozen weights, so that it is
            measured after the adapter was built.
        finish: (path, new adapter, layer) -> None; called after the adapter was built, to set what needs the layer.
    """

    config: Any
    tensors: dict[str, dict[str, Tensor]]
    combination_type: str
    losses: Mapping[str, Loss] | None = None
    finish: Callable[[str, Adapter, BaseLayer], None] = lambda path, adapter, base: None


class Combine(Protocol):
    """Combines adapters of one method, or of several methods that share this object."""

    types: Sequence[str]
    """The valid values of ``combination_type``."""
    usual_type: str
    """PEFT's default ``combination_type``."""

    def takes(self, combination_type: str) -> Collection[str]:
        """The settings that have an effect for a type, among ``svd_rank``, ``svd_clamp`` and ``density``."""
        ...

    def __call__(
        self,
        layers: Mapping[str, Mapping[str, Member]],
        configs: Sequence[Any],
        adapters: Sequence[str],
        weights: Sequence[float],
        settings: Mapping[str, Any],
    ) -> Combination:
        """Combines adapters layer by layer.

        Args:
            layers: path -> adapter name -> adapter, in the model's order.
            configs: configs of each adapter.
            adapters: names; an adapter that a layer does not have adds nothing there.
            weights: weights of each adapter; negative weights subtract.
            settings: ``combination_type`` and the settings that it takes.

        Returns:
            The new adapter.

        Raises:
            AdapterError: they cannot be combined.
            ConfigError: a setting is unknown or invalid for these adapters.
        """
        ...


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Checks that each adapter has one finite weight.

    Args:
        adapters: names of the adapters to combine.
        weights: weights of each.

    Raises:
        AdapterError: there are no adapters, there are more or fewer weights, or a weight is not finite.
    """
    if not adapters:
        raise AdapterError("no adapters to combine: name at least one")
    if len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters ({', '.join(adapters)}) need as many weights, got {len(weights)}",
            adapters=tuple(adapters),
            weights=tuple(weights),
        )
    for name, weight in zip(adapters, weights, strict=True):
        if not is_number(weight) or not math.isfinite(weight):
            shown = weight if is_number(weight) else repr(weight)
            raise AdapterError(f"the weight of adapter {name!r} is {shown}, expected a finite number", adapter=name)


def is_number(value: object) -> bool:
    """Whether a value other than a string converts to a float; a tensor with one element does."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, str | bytes)
