"""optimum-quanto layers: frozen QLinear modules with int8, int4, int2 or float8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import WrappedWeight, loaded, plain


@register_backend
class Quanto(WrappedWeight):
    """``optimum.quanto.nn.QLinear``, frozen or not; also other quanto modules (QConv2d)."""

    name = "quanto"

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is one of quanto's modules with a quantized weight."""
        if not isinstance(module, loaded("optimum.quanto.nn.qmodule", "QModuleMixin")):
            return False
        quantized: Any = module
        return quantized.weight_qtype is not None

    def label(self, module: nn.Module) -> str:
        """``qint8``, ``qint4``, …, or the dtype while it is not frozen."""
        quantized: Any = module
        return str(quantized.weight_qtype.name) if quantized.frozen else super().label(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), a new tensor; the stored tensor while the module is not frozen."""
        quantized: Any = module
        return super().dequantize(module) if quantized.frozen else plain(quantized.weight)

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes with the module's own type, group size and optimizer."""
        quantized: Any = module
        if not quantized.frozen:
            with torch.no_grad():
                plain(quantized.weight).copy_(weight)
            return
        self.replace(module, weight.detach().to(self.device(module), self.dtype(module)).contiguous())
        with torch.no_grad():
            quantized.freeze()
        quantized.weight.requires_grad_(False)
