"""What merging costs in accuracy: rounding a merged weight again, layer by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nbpeft.model.merge_parts import LayerDelta

_ROWS = 1024


@dataclass(frozen=True)
class LayerError:
    """Distance of a merged weight to the exact sum of the frozen weight and the delta, over its norm.

    Attributes:
        path: where the layer is.
        full_precision: for the copy in full precision.
        requantized: for the weight quantized again; None for a layer that is not quantized.
        norm: of the exact weight.
        delta_norm: of what the adapters add to it.
    """

    path: str
    full_precision: float
    requantized: float | None
    norm: float
    delta_norm: float


@dataclass(frozen=True)
class MergeErrors:
    """The error of each choice, by layer and in total.

    An error small beside the weight can be large beside what the adapter adds: quantized again,
    an element that moves less than half a step of its grid falls back to where it was.

    Attributes:
        layers: one entry a layer, in model order.
        dtype: of the copy in full precision.
    """

    layers: tuple[LayerError, ...]
    dtype: str

    @property
    def full_precision(self) -> float:
        """Relative error of the copy in full precision over all layers."""
        return _total((layer.full_precision, layer.norm) for layer in self.layers)

    @property
    def requantized(self) -> float | None:
        """Relative error of quantizing again over all quantized layers; None if there are none."""
        found = [(layer.requantized, layer.norm) for layer in self.layers if layer.requantized is not None]
        return _total(found) if found else None

    def of_delta(self, error: float) -> float:
        """A total error over the norm of what the adapters add, instead of over the weights'."""
        added = math.hypot(*(layer.delta_norm for layer in self.layers))
        return error * math.hypot(*(layer.norm for layer in self.layers)) / added if added else 0.0

    def delta_words(self, error: float) -> str:
        """``of_delta`` for a person: ``7.1 %``, ``112 %``."""
        percent = 100 * self.of_delta(error)
        return f"{percent:.2g} %" if percent < 99.5 else f"{percent:,.0f} %"

    def worst(self) -> LayerError | None:
        """The layer that suffers most from quantizing again (or from rounding, where none is quantized)."""
        return max(self.layers, key=lambda layer: (layer.requantized or 0.0, layer.full_precision), default=None)

    def __str__(self) -> str:
        ways = [] if self.requantized is None else [("quantized again", self.requantized)]
        told = [
            f"{way} {error:.2g} ({self.delta_words(error)} of what the adapter adds)"
            for way, error in [*ways, (f"in {self.dtype}", self.full_precision)]
        ]
        return f"relative error of the merged weights: {', '.join(told)}"


@torch.no_grad()
def requantized_error(delta: LayerDelta, exact: Tensor) -> float | None:
    """Error of storing a merged weight quantized as the layer is; the layer itself is not touched.

    Args:
        delta: of the layer.
        exact: the merged weight, float32, in the module's own orientation.
    """
    backend, module = delta.base.backend, delta.base.module
    if not delta.quantized or not backend.can_merge:
        return None
    twin = copy.deepcopy(module)
    backend.store(twin, exact)
    return relative_error(backend.dequantize(twin), exact)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; row by row, so that it takes no third weight."""
    difference = total = 0.0
    for start in range(0, max(exact.shape[0], 1), _ROWS):
        true = exact[start : start + _ROWS].float()
        difference += float((value[start : start + _ROWS].to(true.device).float() - true).square().sum())
        total += float(true.square().sum())
    return math.sqrt(difference / total) if total else 0.0


def _total(parts: Iterable[tuple[float | None, float]]) -> float:
    errors = norms = 0.0
    for error, norm in parts:
        errors += ((error or 0.0) * norm) ** 2
        norms += norm**2
    return math.sqrt(errors / norms) if norms else 0.0
