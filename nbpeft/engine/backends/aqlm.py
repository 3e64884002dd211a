"""AQLM layers: weights as sums of codebook entries. Tested on CPU with aqlm 1.1.7.

On a CPU the first forward swaps the first two axes of the codes.

Reference: https://arxiv.org/abs/2401.06118.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import ReadOnlyWeight, loaded


@register_backend
class Aqlm(ReadOnlyWeight):
    """``aqlm.QuantizedLinear``."""

    name = "aqlm"
    unmergeable_reason = (
        "finding codebooks takes hours; keep the adapter unmerged, or merge into a full-precision copy of the base"
    )

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is the library's linear layer."""
        return isinstance(module, loaded("aqlm.inference", "QuantizedLinear"))

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), a new tensor: the sum of the codebook entries of each group, times its scale."""
        layer: Any = module
        with torch.no_grad():
            codes = layer.codes.long() & (layer.codebook_size - 1)
            if layer.gemv_op is not None and not layer.codes.is_cuda and layer.codebook_size == 256:
                codes = codes.transpose(0, 1)
            groups: Tensor = sum(book[codes[..., number]] for number, book in enumerate(layer.codebooks))
            weight: Tensor = (groups * layer.scales).transpose(1, 2).reshape(layer.out_features, layer.in_features)
        return weight
