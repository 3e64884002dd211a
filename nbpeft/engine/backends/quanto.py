"""optimum-quanto layers: frozen QLinear modules with int8, int4, int2 or float8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import StoredWeight, inner_tensors, loaded, moved_copy, plain


@register_backend
class Quanto(StoredWeight):
    """``optimum.quanto.nn.QLinear``, frozen or not; also other quanto modules (QConv2d)."""

    name = "quanto"

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is one of quanto's modules with a quantized weight."""
        if not isinstance(module, loaded("optimum.quanto.nn.qmodule", "QModuleMixin")):
            return False
        quantized: Any = module
        return quantized.weight_qtype is not None

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return inner_tensors(module.weight)

    def label(self, module: nn.Module) -> str:
        """``qint8``, ``qint4``, …, or the dtype while it is not frozen."""
        quantized: Any = module
        return str(quantized.weight_qtype.name) if quantized.frozen else super().label(module)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the dequantized weight."""
        weight: Any = module.weight
        dtype: torch.dtype = weight.dtype
        return dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), a new tensor; the stored tensor while the module is not frozen."""
        quantized: Any = module
        if not quantized.frozen:
            return plain(quantized.weight)
        with torch.no_grad():
            dense: Tensor = quantized.weight.detach().dequantize()
        return dense

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes with the module's own type, group size and optimizer."""
        quantized: Any = module
        if not quantized.frozen:
            with torch.no_grad():
                plain(quantized.weight).copy_(weight)
            return
        dense = weight.detach().to(self.device(module), self.dtype(module)).contiguous()
        module._parameters["weight"] = nn.Parameter(dense, requires_grad=False)
        with torch.no_grad():
            quantized.freeze()
        quantized.weight.requires_grad_(False)

    def snapshot(self, module: nn.Module) -> Any:
        """A copy on the CPU."""
        weight: Any = module.weight
        return moved_copy(weight.detach(), "cpu")

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Replaces the weight by a copy of the snapshot."""
        weight = moved_copy(snapshot, self.device(module))
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
