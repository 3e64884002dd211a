"""Logits that are not computed before somebody needs them, and never as a whole for a cross entropy.

A model's own forward goes on with them after its head: it caps or scales them, shifts and flattens them and hands
them to its loss. What acts on each logit alone is kept, to be done with each chunk; what chooses among the tokens is
done with the hidden states; and ``cross_entropy`` is computed in chunks. Anything else gets the logits with their data.
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
"""What needs no data."""
_POINTWISE = frozenset(
    (
        *("float", "half", "bfloat16", "double", "to"),
        *("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide"),
        *("add", "add_", "sub", "sub_", "neg", "tanh", "tanh_", "clamp", "clamp_"),
    )
)
"""What acts on each logit alone, given numbers."""
_RESHAPING = frozenset(("view", "reshape", "flatten"))
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


class LogitsError(RuntimeError):
    """Something takes logits in a way in which their gradient would be lost."""


@dataclass
class ChunkedHead:
    """How logits of a head are computed, and what became of them.

    Attributes:
        chunk_size: tokens whose logits may be in memory at once.
        divisor: what sums over tokens will be divided by, where that is known: rounding is done after it.
        chunked: whether a loss was computed in chunks.
        needed_by: the function that needed the logits with their data; empty where none did.
    """

    chunk_size: int
    divisor: Tensor | float | None = None
    chunked: bool = False
    needed_by: str = ""


class LazyLogits(Tensor):
    """The logits of a language model's head: a tensor with shape, dtype and device, and no data before it is needed.

    Attributes:
        hidden: what the head is given, (…, features).
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
        """Returns what a head gives, (…, ``size``).

        Args:
            hidden: the head's input, (…, features), floating.
            head: computes the logits (…, size) of hidden states (…, features).
            size: of the vocabulary.
            settings: how; what becomes of the logits is noted there.
            parts: where what the head computes depends on the row, its first and last but one -> the head of rows.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        parts = {rows: _as_now(own, kind) for rows, own in parts.items()}
        return cls._make(hidden, size, dtype, hidden.device, _as_now(head, kind), (), settings, parts)

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
        made: LazyLogits = make(cls, (*hidden.shape[:-1], size), dtype=dtype, device=device)
        made.hidden, made._head, made._pointwise, made._settings = hidden, head, pointwise, settings
        made._parts, made._whole = parts, None
        return made

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
                answer = logits._answer(func, args, kwargs)
                if answer is not None:
                    return answer
        name = getattr(func, "__name__", str(func))
        return func(*_with_data(args, name), **_with_data(kwargs, name))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        raise LogitsError(f"{func} takes logits where their gradient would be lost")

    def with_data(self, name: str) -> Tensor:
        """Returns the logits with their data; computed once.

        Args:
            name: of the function that needs them.
        """
        if self._whole is None:
            self._settings.needed_by = self._settings.needed_by or name
            self._whole = _logits(self._head, self._pointwise, self.hidden)
        return self._whole

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns what a function returns without the data; None where it needs them."""
        if self._parts and getattr(func, "__name__", "") not in _POINTWISE:
            return self._rows(args[1]) if func is Tensor.__getitem__ else None
        if func is F.cross_entropy:
            return self._cross_entropy(*args, **kwargs)
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
        """These logits of other tokens, or in another order of axes."""
        hidden = function(self.hidden)
        return self._make(hidden, self.size(-1), self.dtype, self.device, self._head, self._pointwise, self._settings)

    def _rows(self, index: Any) -> LazyLogits | None:
        """These logits of neighbouring rows for which the head computes alike; None of others."""
        rows = index.indices(len(self.hidden)) if isinstance(index, slice) else (0, 0, 0)
        head = self._parts.get(rows[:2]) if rows[2] == 1 else None
        if head is None:
            return None
        hidden = self.hidden[index]
        return self._make(hidden, self.size(-1), self.dtype, self.device, head, self._pointwise, self._settings)

    def _apply(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LazyLogits | None:
        """These logits after a function of each; None where it is one of others, too."""
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
        """Returns the loss, computed in chunks; None where it is one of another kind."""
        given = _CROSS_ENTROPY.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        target: Any = values["target"]
        unusual = [values[name] for name in ("weight", "size_average", "reduce") if values[name] is not None]
        if unusual or self.dim() != 2 or target.dim() != 1 or target.is_floating_point():
            return None
        if values["reduction"] not in ("mean", "sum"):
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
            **{name: values[name] for name in ("ignore_index", "reduction", "label_smoothing")},
        )


def _logits(head: Head, pointwise: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor) -> Tensor:
    logits = head(hidden)
    for function in pointwise:
        logits = function(logits)
    return logits


def _is_the_same_for_all_tokens(value: Any, size: int) -> bool:
    """Returns whether an argument is a constant, or one a class, as the bias of logits is."""
    if not isinstance(value, Tensor):
        return True
    return not value.requires_grad and (value.numel() == 1 or value.numel() == value.shape[-1] == size)


def _with_data(values: Any, name: str) -> Any:
    return tree_map_only(LazyLogits, lambda logits: logits.with_data(name), values)


def _as_now(head: Head, kind: str) -> Head:
    """Returns the head as it computes at this moment, under autocast or not."""
    if not torch.is_autocast_enabled(kind):
        return head
    dtype = torch.get_autocast_dtype(kind)

    def compute(hidden: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype):
            return head(hidden)

    return compute


def _index_of_tokens(index: Any, axes: int, size: int) -> Any:
    """Returns the same index for hidden states; None where it does not take the whole vocabulary, or is one of tensors."""
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
