"""torchao weights: tensor subclasses inside ordinary nn.Linear layers.

All of them can be read; int8 weight-only tensors can also be written, with their granularity. Written for torchao 0.18
(``quantize_(model, Int8WeightOnlyConfig())``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import WrappedWeight
from nbpeft.errors import MergeError


@register_backend
class TorchAO(WrappedWeight):
    """A layer whose ``weight`` is one of torchao's tensors."""

    name = "torchao"

    def matches(self, module: nn.Module) -> bool:
        """Whether the weight's class is torchao's, by its module name, without importing torchao."""
        weight = module._parameters.get("weight")
        return weight is not None and type(weight).__module__.startswith("torchao.")

    def label(self, module: nn.Module) -> str:
        """``int8 torchao`` or ``int4 torchao``, from the class of the tensor."""
        kind = type(module.weight).__name__.lower()
        bits = next((bits for bits in ("int8", "int4", "float8", "nf4") if kind.startswith(bits)), kind)
        return f"{bits} torchao"

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes with the granularity of the current weight.

        Raises:
            MergeError: this kind of tensor cannot be written.
        """
        old: Any = module.weight
        if type(old).__name__ != "Int8Tensor" or getattr(old, "act_quant_kwargs", None) is not None:
            raise MergeError(
                f"torchao's {type(old).__name__} cannot be written: only int8 weight-only tensors can; "
                "keep the adapter unmerged, or merge into a full-precision copy",
                kind=type(old).__name__,
            )
        with torch.no_grad():
            new = type(old).from_hp(
                weight.detach().to(old.device, old.dtype), granularity=_granularity(old), mapping_type=_mapping(old)
            )
        self.replace(module, new)


def _granularity(weight: Any) -> Any:
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    rows, columns = weight.block_size
    if (rows, columns) == tuple(weight.shape):
        return PerTensor()
    return PerRow() if columns == weight.shape[1] else PerGroup(columns)


def _mapping(weight: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    zeros = weight.zero_point
    return MappingType.SYMMETRIC if zeros is None or not bool(zeros.any()) else MappingType.ASYMMETRIC
