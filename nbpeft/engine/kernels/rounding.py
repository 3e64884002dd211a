"""Rounds a weight to a quantization grid so that the layer's outputs change little (GPTQ).

The delta of an adapter is often smaller than half a step of a 4-bit grid, so that rounding each number to the nearest
level would undo it. Here the rounding error of each column is added to the columns that are not rounded yet, in the
proportion that changes the outputs least on calibration inputs.

Reference: GPTQ, https://arxiv.org/abs/2210.17323 (columns in the order of their inputs' energy, the largest first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_DAMPING = 0.01
"""Share of the mean energy that is added to that of every input, so that rare inputs have little influence."""
_BLOCK = 64
"""Columns whose errors are passed on to the later columns in one matrix product."""


@dataclass(frozen=True)
class Grid:
    """The values that a stored weight can have.

    Attributes:
        levels: float32, ascending, in units of the scales.
        scales: float32, of each number; broadcasts to (out, in).
        stored: function from the index of each number's level, (out, in), to what the backend's ``restore`` takes.
    """

    levels: Tensor
    scales: Tensor
    stored: Callable[[Tensor], Any]

    def values(self, places: Tensor) -> Tensor:
        """The weight for given level indices, both (out, in); the result is float32."""
        return self.levels[places.int()] * self.scales


@runtime_checkable
class HasGrid(Protocol):
    """A weight backend whose grid is known, so that the level of each number can be chosen."""

    def grid(self, module: nn.Module, weight: Tensor) -> Grid | None:
        """The present grid of a layer, widened if another weight exceeds it.

        Args:
            module: the layer, which is not changed.
            weight: to be rounded, (out, in) float32.

        Returns:
            The grid; None if it is unknown, or the layer is not quantized yet.
        """
        ...


@torch.no_grad()
def round_with_feedback(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """Rounds a weight so that its products with inputs like the calibration data change little.

    Args:
        weight: (out, in) float32.
        gram: the sum or mean of x xᵀ over calibration inputs x of the layer, (in, in) float32.
        grid: to round to.

    Returns:
        The index of the level of each number, (out, in) uint8.
    """
    energy = gram.diagonal()
    order = torch.argsort(energy, descending=True, stable=True)
    factor = _factor(gram[order][:, order], _DAMPING * float(energy.mean()) or 1.0)
    bounds = (grid.levels[1:] + grid.levels[:-1]) / 2
    # Transposed, so that each column of the weight is contiguous in memory.
    left, scales = (part.t()[order].contiguous() for part in (weight, grid.scales.expand_as(weight)))
    places = torch.empty_like(left, dtype=torch.uint8)
    for first in range(0, len(left), _BLOCK):
        last = min(first + _BLOCK, len(left))
        errors = left.new_empty(last - first, left.shape[1])
        for row in range(first, last):
            place = torch.bucketize((left[row] / scales[row]).nan_to_num_(0.0), bounds, out_int32=True)
            places[row] = place
            error = errors[row - first]
            torch.sub(left[row], grid.levels[place] * scales[row], out=error)
            error /= factor[row, row]
            left[row + 1 : last].addr_(factor[row, row + 1 : last], error, alpha=-1.0)
        left[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1.0)
    rounded = torch.empty_like(places)
    rounded[order] = places
    return rounded.t().contiguous()


def _factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, which is changed in place."""
    gram.diagonal().add_(damping)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


def share_lost(rounded: Tensor, wanted: Tensor, frozen: Tensor, gram: Tensor) -> float:
    """The error that rounding causes in the outputs, relative to the effect of the adapter.

    Args:
        rounded: the stored weight, (out, in).
        wanted: the weight before rounding, (out, in).
        frozen: the weight without the adapter, (out, in).
        gram: Gram matrix of the inputs, (in, in); see ``round_with_feedback``.

    Returns:
        Root mean square error divided by root mean square effect; 0 if the adapter has no effect.
    """
    error, effect = rounded - wanted, wanted - frozen
    lost, all_of_it = ((part @ gram).mul_(part).sum().clamp(min=0.0).sqrt() for part in (error, effect))
    return float(lost / all_of_it) if float(all_of_it) else 0.0
