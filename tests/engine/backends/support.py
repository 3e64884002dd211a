"""Helpers of the tests of backends."""

from __future__ import annotations

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
