"""Logits that are computed only when they are needed, and in chunks for a cross entropy.

After the head, a model's forward caps or scales the logits, shifts and flattens them, and passes them to its loss.
Here pointwise functions are recorded and applied to each chunk, selections of tokens are applied to the hidden states
instead, and ``cross_entropy`` is computed in chunks. Every other function gets the logits with their data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nbpeft.errors import TrainingError
from nbpeft.losses.cross_entropy import Head, chunked_cross_entropy
from nbpeft.losses.weighted_labels import WeightedLabels

_ABOUT = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout")
    ]
    + [getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__hash__", "__len__")]
    + [torch.numel, torch.is_floating_point]
)
"""Functions that need no data."""
_POINTWISE = frozenset(
    (
        *("float", "half", "bfloat16", "double", "to"),
        *("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide"),
        *("add", "add_", "sub", "sub_", "neg", "tanh", "tanh_", "clamp", "clamp_"),
    )
)
"""Names of pointwise functions: each logit's result depends on no other logit."""
_RESHAPING = frozenset(("view", "reshape", "flatten"))
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


@dataclass
class ChunkedHead:
    """How the logits of a head are computed, and a record of what they were used for.

    Attributes:
        chunk_size: number of tokens whose logits may be in memory at once.
        divisor: the number by which a sum over tokens will be divided, or None if unknown.
        sampled: whether chunks that allocate the same memory as another one are skipped.
        chunked: whether a loss was computed in chunks.
        needed_by: name of the first function that needed the logits with their data; empty if none did.
    """

    chunk_size: int
    divisor: Tensor | float | None = None
    sampled: bool = False
    chunked: bool = False
    needed_by: str = ""


class LazyLogits(Tensor):
    """The logits of a language model's head: a tensor with shape, dtype and device whose data is computed on demand.

    Attributes:
        hidden: the head's input, (…, features).
    """

    hidden: Tensor
    _head: Head
    _pointwise: tuple[Callable[[Tensor], Tensor], ...]
    _settings: ChunkedHead
    _parts: Mapping[tuple[int, int], Head]
    _whole: Tensor | None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: Head,
        size: int,
        settings: ChunkedHead,
        parts: Mapping[tuple[int, int], Head] = MappingProxyType({}),
    ) -> LazyLogits:
        """Returns the lazy output of a head, (…, ``size``).

        Args:
            hidden: the head's input, floating-point, (…, features).
            head: computes logits (…, size) from hidden states (…, features).
            size: size of the vocabulary.
            settings: how the logits are computed; the use of the logits is recorded in it.
            parts: for a batch whose rows use several adapters: (first row, end) -> the head of these rows.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        parts = {rows: _with_autocast(row_head, kind) for rows, row_head in parts.items()}
        return cls._make(hidden, size, dtype, hidden.device, _with_autocast(head, kind), (), settings, parts)

    @classmethod
    def _make(
        cls,
        hidden: Tensor,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        head: Head,
        pointwise: tuple[Callable[[Tensor], Tensor], ...],
        settings: ChunkedHead,
        parts: Mapping[tuple[int, int], Head] = MappingProxyType({}),
    ) -> LazyLogits:
        make: Any = Tensor._make_wrapper_subclass
        logits: LazyLogits = make(cls, (*hidden.shape[:-1], size), dtype=dtype, device=device)
        logits.hidden, logits._head, logits._pointwise, logits._settings = hidden, head, pointwise, settings
        logits._parts, logits._whole = parts, None
        return logits

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **kwargs)
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, LazyLogits) and logits._whole is None:
                is_loss = func is F.cross_entropy and not logits._parts
                answer = logits._cross_entropy(*args, **kwargs) if is_loss else logits._answer(func, args, kwargs)
                if answer is not None:
                    return answer
        name = getattr(func, "__name__", str(func))
        return func(*_with_data(args, name), **_with_data(kwargs, name))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # Below autograd: reached only by functions that __torch_function__ did not see, e.g. of C++ code.
        raise TrainingError(f"{func} takes logits where their gradient would be lost")

    def with_data(self, name: str) -> Tensor:
        """Returns the logits with their data, which is computed once.

        Args:
            name: name of the function that needs them.
        """
        if self._whole is None:
            self._settings.needed_by = self._settings.needed_by or name
            self._whole = _logits(self._head, self._pointwise, self.hidden)
        return self._whole

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the result of a function that needs no data; None if it needs the data."""
        if self._parts and getattr(func, "__name__", "") not in _POINTWISE:
            return self._rows(args[1]) if func is Tensor.__getitem__ else None
        name = getattr(func, "__name__", "")
        if name in _POINTWISE and not kwargs.keys() & {"input", "out"}:
            return self._apply(func, name, args[1:], kwargs)
        if name == "__getitem__":
            index = _index_of_tokens(args[1], self.dim(), self.size(-1))
            return None if index is None else self._choose(lambda rows: rows[index])
        if name == "contiguous":
            return self._choose(lambda rows: rows)
        if name in _RESHAPING and all(isinstance(value, int | tuple | list) for value in args[1:]):
            shape = getattr(torch.empty((), device="meta").expand(self.shape), name)(*args[1:], **kwargs).shape
            if shape and shape[-1] == self.size(-1):
                return self._choose(lambda rows: rows.reshape(*shape[:-1], rows.shape[-1]))
        return None

    def _choose(self, function: Callable[[Tensor], Tensor]) -> LazyLogits:
        """Returns the logits after a selection or reshaping of tokens, which is applied to the hidden states."""
        hidden = function(self.hidden)
        return self._make(hidden, self.size(-1), self.dtype, self.device, self._head, self._pointwise, self._settings)

    def _rows(self, index: Any) -> LazyLogits | None:
        """Returns the logits of consecutive rows that use the same adapter; None for another index."""
        rows = index.indices(len(self.hidden)) if isinstance(index, slice) else (0, 0, 0)
        head = self._parts.get(rows[:2]) if rows[2] == 1 else None
        if head is None:
            return None
        hidden = self.hidden[index]
        return self._make(hidden, self.size(-1), self.dtype, self.device, head, self._pointwise, self._settings)

    def _apply(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LazyLogits | None:
        """Returns the logits after a pointwise function; None if its arguments make it depend on the token."""
        if not all(_is_the_same_for_all_tokens(value, self.size(-1)) for value in (*args, *kwargs.values())):
            return None
        args = tuple(value.reshape(-1) if isinstance(value, Tensor) and value.dim() > 1 else value for value in args)
        sample = func(torch.empty(0, self.size(-1), dtype=self.dtype, device=self.device), *args, **kwargs)
        function = func if not args and not kwargs else lambda logits: func(logits, *args, **kwargs)
        pointwise = (*self._pointwise, function)
        if name.endswith("_"):
            self._pointwise = pointwise
            return self
        return self._make(
            self.hidden,
            self.size(-1),
            sample.dtype,
            sample.device,
            self._head,
            pointwise,
            self._settings,
            self._parts,
        )

    def _cross_entropy(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Returns the loss, computed in chunks; None if its options are not supported."""
        call = _CROSS_ENTROPY.bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        target: Any = values["target"]
        unusual = [values[name] for name in ("weight", "size_average", "reduce") if values[name] is not None]
        if unusual or self.dim() != 2 or target.dim() != 1 or target.is_floating_point():
            return None
        if values["reduction"] not in ("mean", "sum", "none"):
            return None
        weights = None
        if isinstance(target, WeightedLabels):
            target.uses.append("chunked cross_entropy")
            target, weights = target.plain, target.weights
        self._settings.chunked = True
        pointwise = self._pointwise
        while pointwise and pointwise[-1] is Tensor.float:  # a loss is computed in float32 anyway
            pointwise = pointwise[:-1]
        return chunked_cross_entropy(
            partial(_logits, self._head, pointwise),
            self.hidden,
            target,
            weights=weights,
            chunk_size=self._settings.chunk_size,
            divisor=self._settings.divisor,
            sampled=self._settings.sampled,
            **{name: values[name] for name in ("ignore_index", "reduction", "label_smoothing")},
        )


def _logits(head: Head, pointwise: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor) -> Tensor:
    logits = head(hidden)
    for function in pointwise:
        logits = function(logits)
    return logits


def _is_the_same_for_all_tokens(value: Any, size: int) -> bool:
    """Returns whether an argument is a constant, or has one value per class, such as a bias of the logits."""
    if not isinstance(value, Tensor):
        return True
    return not value.requires_grad and (value.numel() == 1 or value.numel() == value.shape[-1] == size)


def _with_data(values: Any, name: str) -> Any:
    return tree_map_only(LazyLogits, lambda logits: logits.with_data(name), values)


def _with_autocast(head: Head, kind: str) -> Head:
    """Returns a head that computes under the current autocast state, also if it is called later."""
    if not torch.is_autocast_enabled(kind):
        return head
    dtype = torch.get_autocast_dtype(kind)

    def compute(hidden: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype):
            return head(hidden)

    return compute


def _index_of_tokens(index: Any, axes: int, size: int) -> Any:
    """Returns the index for the hidden states; None if it contains tensors or does not select the whole vocabulary."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, slice) or part is Ellipsis or type(part) is int for part in parts):
        return None
    if Ellipsis not in parts and len(parts) < axes:
        return tuple(parts)
    last = parts[-1]
    if last is Ellipsis:
        return tuple(parts) if len(parts) <= axes else None
    if not isinstance(last, slice) or last.indices(size) != (0, size, 1):
        return None
    return (*parts[:-1], slice(None))
