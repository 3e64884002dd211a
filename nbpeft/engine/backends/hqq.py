"""HQQ layers (half-quadratic quantization): packed codes in ``W_q``, scales and zeros in ``meta``.

Reference: https://github.com/mobiusml/hqq, version 0.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import StoredWeight, loaded, plain


@dataclass(frozen=True)
class HqqSnapshot:
    """Codes and metadata, their tensors on the CPU."""

    codes: Tensor
    meta: dict[str, Any]


@register_backend
class Hqq(StoredWeight):
    """``hqq.core.quantize.HQQLinear``."""

    name = "hqq"

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is the library's linear layer."""
        return isinstance(module, loaded("hqq.core.quantize", "HQQLinear"))

    def tensors(self, module: nn.Module) -> list[Tensor]:
        found = [plain(module.W_q)]
        _map_tensors(_meta(module), lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def label(self, module: nn.Module) -> str:
        """``4-bit hqq``."""
        return f"{_meta(module)['nbits']}-bit hqq"

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the layer computes in."""
        layer: Any = module
        return layer.compute_dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), a new tensor."""
        layer: Any = module
        with torch.no_grad():
            dense: Tensor = layer.dequantize().detach()
        return dense.clone() if dense.is_inference() else dense

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes with the layer's own config, with zero points optimized as in the library."""
        layer: Any = module
        place = self.device(module)
        settings = copy.deepcopy(layer.quant_config)
        settings.pop("offload_meta", None)
        codes, meta = layer.W_q, layer.meta
        # The library first assigns a plain tensor, which a module refuses if a parameter has that name.
        del layer.W_q
        try:
            with torch.no_grad():
                layer.quantize(weight.detach().to(place, layer.compute_dtype), **settings)
        except BaseException:
            layer.W_q, layer.meta = codes, meta
            raise

    def snapshot(self, module: nn.Module) -> HqqSnapshot:
        """Codes and metadata on the CPU."""
        return HqqSnapshot(plain(module.W_q).to("cpu", copy=True), _map_tensors(_meta(module), _to("cpu")))

    def restore(self, module: nn.Module, snapshot: HqqSnapshot) -> None:
        """Restores codes and metadata."""
        layer: Any = module
        place = self.device(module)
        layer.W_q = nn.Parameter(snapshot.codes.to(place, copy=True), requires_grad=False)
        layer.meta = _map_tensors(snapshot.meta, _to(place))


def _meta(module: nn.Module) -> dict[str, Any]:
    layer: Any = module
    return layer.meta


def _to(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.detach().to(device, copy=True)


def _map_tensors(meta: dict[str, Any], work: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The metadata with every tensor replaced; nested metadata (of quantized scales) too."""
    return {
        key: work(value)
        if isinstance(value, Tensor)
        else _map_tensors(value, work)
        if isinstance(value, dict)
        else value
        for key, value in meta.items()
    }
