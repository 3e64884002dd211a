"""Rounding a weight to a grid so that a layer's outputs stay, not each number by itself.

What an adapter adds to a weight is often less than half a step between two levels of a 4-bit grid, so that
rounding each number to the nearest level puts the weight back to where it was. Here the error of each column goes on
to those that are not rounded yet, in the proportion that changes the outputs least on inputs that were seen.

Reference: GPTQ, https://arxiv.org/abs/2210.17323 (columns in the order of their inputs' energy, the largest first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_DAMPING = 0.01
"""Share of the mean energy that is added to every input's: inputs that were hardly seen decide little."""
_BLOCK = 64
"""Columns whose errors are handed on at once."""


@dataclass(frozen=True)
class Grid:
    """The values that a stored weight can have.

    Attributes:
        levels: ascending, float32, in units of the scales.
        scales: of each number, broadcasts to (out, in), float32.
        stored: given the place of each number among the levels, (out, in), what the backend's ``restore`` takes.
    """

    levels: Tensor
    scales: Tensor
    stored: Callable[[Tensor], Any]

    def values(self, places: Tensor) -> Tensor:
        """The weight whose numbers are at these places, (out, in) float32."""
        return self.levels[places.int()] * self.scales


@runtime_checkable
class HasGrid(Protocol):
    """A way to store a weight whose grid is known, so that what a weight is rounded to can be chosen."""

    def grid(self, module: nn.Module, weight: Tensor) -> Grid | None:
        """The grid that a layer's weight has now, wider where another weight reaches beyond it.

        Args:
            module: the layer, which stays as it is.
            weight: to be rounded, (out, in) float32.

        Returns:
            None where it is not known, or the layer is not quantized yet.
        """
        ...


@torch.no_grad()
def round_with_feedback(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """Rounds a weight so that its products with inputs like those seen change little.

    Args:
        weight: (out, in) float32.
        gram: the sum or mean of x xᵀ over the inputs x of the layer, (in, in) float32.
        grid: to round to.

    Returns:
        The place of each number among the levels, (out, in) uint8.
    """
    energy = gram.diagonal()
    order = torch.argsort(energy, descending=True, stable=True)
    factor = _factor(gram[order][:, order], _DAMPING * float(energy.mean()) or 1.0)
    bounds = (grid.levels[1:] + grid.levels[:-1]) / 2
    # Columns as rows, so that each of them is one piece of memory.
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
    """The upper Cholesky factor of the damped inverse."""
    gram.diagonal().add_(damping)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    return factor


def share_lost(rounded: Tensor, wanted: Tensor, frozen: Tensor, gram: Tensor) -> float:
    """What rounding takes away of what a change of the weight does to the outputs, as a share of it.

    Args:
        rounded: the weight that is stored, (out, in).
        wanted: the weight that was to be stored, (out, in).
        frozen: the weight before the change, (out, in).
        gram: of the inputs, (in, in).

    Returns:
        Root mean square error over root mean square effect; 0 where the change has no effect.
    """
    error, effect = rounded - wanted, wanted - frozen
    lost, all_of_it = ((part @ gram).mul_(part).sum().clamp(min=0.0).sqrt() for part in (error, effect))
    return float(lost / all_of_it) if float(all_of_it) else 0.0
