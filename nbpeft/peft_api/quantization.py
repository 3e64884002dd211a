"""PEFT's names of the ways to store a quantized weight: nbpeft's backends."""

from __future__ import annotations

from typing import Any

from torch import nn

from nbpeft.engine.backends.bnb4bit import Bnb4bit as Bnb4bitBackend
from nbpeft.engine.backends.bnb8bit import Bnb8bit as Bnb8bitBackend
from nbpeft.engine.backends.hqq import Hqq as HqqBackend
from nbpeft.engine.backends.torchao import TorchAO as TorchaoBackend
from nbpeft.engine.contract.base import Backend
from nbpeft.engine.contract.registry import resolve_backend
from nbpeft.engine.kernels.storage import ReadOnlyWeight as ForwardOnlyQuantizationBackend
from nbpeft.engine.kernels.storage import StoredWeight as QuantizationBackend

__all__ = [
    "Bnb4bitBackend",
    "Bnb8bitBackend",
    "ForwardOnlyQuantizationBackend",
    "HqqBackend",
    "QuantizationBackend",
    "TorchaoBackend",
    "resolve_quantization_backend",
]


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Backend | None:
    """Returns the backend of a layer's quantized weight; None if it is not quantized.

    Args:
        base_layer: the layer, without adapters.
        **kwargs: accepted for compatibility with PEFT and ignored.
    """
    backend = resolve_backend(base_layer)
    return backend if backend is not None and backend.backend_name else None
