"""Weights stored as ordinary floating tensors: nn.Linear, Conv1D, nn.Embedding, nn.Conv1d/2d/3d."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import StoredWeight


@register_backend
class Dense(StoredWeight):
    """A floating ``weight`` of at least two bytes per element, on any kind of layer."""

    name = "dense"
    priority = 0

    def matches(self, module: nn.Module) -> bool:
        """Whether ``weight`` is an ordinary or sharded tensor, not a wrapper subclass around other tensors."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
            return False
        wraps: bool = is_traceable_wrapper_subclass(weight)
        return not wraps or type(weight).__name__ == "DTensor"

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return [_weight(module)]

    def dequantize(self, module: nn.Module) -> Tensor:
        """The stored tensor itself, detached: writing to it changes the module."""
        return _weight(module)

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Copies ``weight`` to the module; has no effect if it is the stored tensor itself, changed in place."""
        stored = _weight(module)
        same = weight.dtype == stored.dtype and weight.stride() == stored.stride()
        if same and stored.device.type != "meta" and weight.data_ptr() == stored.data_ptr():
            return
        with torch.no_grad():
            stored.copy_(weight)

    def snapshot(self, module: nn.Module) -> Tensor:
        """A copy on the CPU."""
        return _weight(module).to("cpu", copy=True)

    def restore(self, module: nn.Module, snapshot: Tensor) -> None:
        """Copies a snapshot back in place."""
        with torch.no_grad():
            _weight(module).copy_(snapshot)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
