"""Helpers of the tests of backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import resolve_backend


def backend_name(layer: nn.Module) -> str | None:
    """Name of the backend of a layer; None if there is none."""
    found = resolve_backend(layer)
    return None if found is None else found.name


def evaluate(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer in evaluation mode, without gradients."""
    with torch.no_grad():
        output: Tensor = layer.eval()(x)
    return output


def error(weight: Tensor, reference: Tensor) -> float:
    """The norm of the difference of two weights, relative to that of the second."""
    weight, reference = weight.detach().float(), reference.detach().float()
    return float((weight - reference).norm() / reference.norm())


def check_grid_of_larger_weight(backend: Any, layer: nn.Module) -> None:
    """Checks that the grid for three times the weight of a layer reaches as far as that weight."""
    before = backend.dequantize(layer).float()
    grid = backend.grid(layer, 3 * before)
    wider, present = grid.scales.expand_as(before), backend.grid(layer, before).scales.expand_as(before)
    assert float((wider / present).min()) > 2.9
    places = torch.bucketize(3 * before / grid.scales, (grid.levels[1:] + grid.levels[:-1]) / 2).to(torch.uint8)
    backend.restore(layer, grid.stored(places))
    assert error(backend.dequantize(layer), 3 * before) < 0.02
