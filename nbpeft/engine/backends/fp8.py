"""Weights in torch's 8-bit floating dtypes with inverse scales (transformers' FP8Linear).

A scale applies to a block of the weight of size ``block_size``, or to the whole weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import StoredWeight, plain

_KINDS = (torch.float8_e4m3fn, torch.float8_e5m2)


@register_backend
class Fp8(StoredWeight):
    """A layer with a float8 ``weight`` and optionally ``weight_scale_inv``."""

    name = "fp8"

    def matches(self, module: nn.Module) -> bool:
        """Whether the weight is a float8 matrix."""
        weight = module._parameters.get("weight")
        return weight is not None and weight.dtype in _KINDS and weight.dim() == 2

    def tensors(self, module: nn.Module) -> list[Tensor]:
        scales = _scales(module)
        return [plain(module.weight)] if scales is None else [plain(module.weight), scales]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """bfloat16, in which models with float8 weights compute."""
        return torch.bfloat16

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in) bfloat16, a new tensor."""
        weight = plain(module.weight).float()
        scales = _scales(module)
        if scales is not None:
            weight *= _spread(scales, module, weight)
        return weight.to(torch.bfloat16)

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes with new scales, from the largest magnitude of each block."""
        stored, scales = plain(module.weight), _scales(module)
        dense = weight.detach().to(stored.device, torch.float32)
        limit = torch.finfo(stored.dtype).max
        with torch.no_grad():
            if scales is not None:
                largest = _largest(dense, scales, module)
                fresh = torch.where(largest > 0, largest / limit, torch.ones_like(largest)).view(scales.shape)
                scales.copy_(fresh)
                dense = dense / _spread(scales, module, dense)
            stored.copy_(dense.clamp(-limit, limit).to(stored.dtype))

    def twin(self, module: nn.Module) -> nn.Module:
        twin = super().twin(module)
        for name in ("weight", "weight_scale_inv"):
            tensor = module._parameters.get(name)
            if tensor is not None:
                twin._parameters[name] = nn.Parameter(plain(tensor).clone(), requires_grad=False)
        return twin

    def snapshot(self, module: nn.Module) -> Any:
        """Weight and scales on the CPU."""
        return [tensor.to("cpu", copy=True) for tensor in self.tensors(module)]

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Copies weight and scales back in place."""
        with torch.no_grad():
            for tensor, copy in zip(self.tensors(module), snapshot, strict=True):
                tensor.copy_(copy)


def _scales(module: nn.Module) -> Tensor | None:
    scales = module._parameters.get("weight_scale_inv")
    return None if scales is None else plain(scales)


def _block(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    size: Any = getattr(module, "block_size", None)
    return tuple(weight.shape) if size is None else tuple(size)  # type: ignore[return-value]


def _spread(scales: Tensor, module: nn.Module, weight: Tensor) -> Tensor:
    """Scales expanded to the shape of the weight."""
    if scales.dim() < 2:
        return scales.float()
    rows, columns = _block(module, weight)
    wide = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def _largest(weight: Tensor, scales: Tensor, module: nn.Module) -> Tensor:
    """Largest magnitude of each block."""
    if scales.dim() < 2:
        return weight.abs().max()
    rows, columns = _block(module, weight)
    down, across = scales.shape
    padded = nn.functional.pad(weight.abs(), (0, across * columns - weight.shape[1], 0, down * rows - weight.shape[0]))
    return padded.view(down, rows, across, columns).amax((1, 3))
