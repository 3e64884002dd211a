"""Counts the bytes of every tensor that is alive inside a block, exactly."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Follows each storage that an operation makes until it is freed.

    Attributes:
        now: bytes alive that were made inside the block.
        peak: most of them at any time.
        limit: raise RuntimeError("out of memory …") instead of going over it; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.limit = limit
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in before or storage._cdata in self._known:
                continue
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)
            if self.limit is not None and self.now > self.limit:
                raise RuntimeError(f"out of memory: {self.now} bytes are more than the {self.limit} there are")
        return result

    def _freed(self, key: int, byte_count: int) -> None:
        self._known.discard(key)
        self.now -= byte_count


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [] if value.device.type == "meta" or isinstance(value, FakeTensor) else [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
