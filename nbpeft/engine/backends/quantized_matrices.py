"""Experts of a mixture in 4 or 8 bits: one bare parameter that contains several quantized matrices.

The tensor class and its operations are in ``nbpeft.engine.kernels.quantized_matrices``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.kernels.storage import StoredWeight, inner_tensors, moved_copy


@register_backend
class QuantizedExperts(StoredWeight):
    """A ``weight`` that is a ``QuantizedMatrices``, usually of a ``ParameterView``."""

    name = "quantized_experts"

    def matches(self, module: nn.Module) -> bool:
        """Whether the weight contains quantized matrices."""
        return isinstance(getattr(module, "weight", None), QuantizedMatrices)

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return inner_tensors(module.weight)

    def label(self, module: nn.Module) -> str:
        """``nf4``, ``nf4 double``, ``fp4`` or ``int8``."""
        return _weight(module).form.label

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the weight before quantization."""
        return _weight(module).dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """All matrices as one new tensor, shaped like the parameter."""
        return _weight(module).dequantize()

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes each matrix in its format, into the same storage; constants of 4 bits are fitted to the codes."""
        _weight(module).write(weight, fit=True)

    def snapshot(self, module: nn.Module) -> Any:
        """A copy on the CPU."""
        return moved_copy(_weight(module), "cpu")

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Copies a snapshot back in place."""
        with torch.no_grad():
            _weight(module).copy_(snapshot)


def _weight(module: nn.Module) -> QuantizedMatrices:
    weight: Any = module.weight
    return weight
