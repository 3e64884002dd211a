"""Counts the tensors that autograd saves for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.kernels.storage import storage_of


class SavedTensors:
    """Context manager that counts the tensors which forward passes inside it save for backward.

    A storage counts once, however many operations save it. Parameters and buffers of ``model`` do not count, and
    neither do tensors that have been freed again (by backward, or with their graph).

    Attributes:
        byte_count: bytes saved now.
        peak: most bytes saved at any time.

    Example:
        with SavedTensors(model) as saved:
            loss = model(**batch).loss
        saved.byte_count
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._excluded = set() if model is None else {_key(t) for t in _tensors_of(model)}
        self._counts: dict[Any, int] = {}
        self.byte_count = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        key = _key(tensor)
        if key in self._excluded:
            return tensor
        count = self._counts.get(key, 0)
        if not count:
            self.byte_count += storage_bytes(tensor)
            self.peak = max(self.peak, self.byte_count)
        self._counts[key] = count + 1
        return _Packed(tensor, self, key)

    def _release(self, key: Any, byte_count: int) -> None:
        count = self._counts.get(key, 0) - 1
        if count > 0:
            self._counts[key] = count
        else:
            self._counts.pop(key, None)
            self.byte_count -= byte_count


class _Packed:
    """The packed form of a saved tensor in the graph; its destructor tells the counter when the graph releases it."""

    __slots__ = ("counter", "key", "tensor")

    def __init__(self, tensor: Tensor, counter: SavedTensors, key: Any) -> None:
        self.tensor = tensor
        self.counter = counter
        self.key = key

    def __del__(self) -> None:
        self.counter._release(self.key, storage_bytes(self.tensor))


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.tensor if isinstance(packed, _Packed) else packed
    return tensor


def storage_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor's storage in bytes; on the meta device, the size it would have."""
    try:
        return storage_of(tensor).nbytes()
    except (NotImplementedError, RuntimeError):
        return tensor.numel() * tensor.element_size()


def _key(tensor: Tensor) -> Any:
    """Return a key that is the same for all views of a storage during its lifetime; meta storages have no address."""
    try:
        return storage_of(tensor)._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _tensors_of(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def tensors_in(value: Any, _depth: int = 6) -> Iterator[Tensor]:
    """Yield all tensors in nested containers and plain objects, such as a KV cache or an optimizer's state.

    Args:
        value: the object to search; modules and classes are skipped.
    """
    if isinstance(value, Tensor):
        yield value
    elif _depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, _depth - 1)
    elif _depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, _depth - 1)
    elif _depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from tensors_in(vars(value), _depth - 1)
