"""Tensors that are computed again in the backward pass instead of being kept for it.

    hidden = recompute(product, gate, up)     # product(gate, up); keeps gate and up alone
    origin_of(hidden)                         # lets whoever needs hidden in backward keep gate and up, too

Activations and norms cost next to nothing beside the matrix products around them, but what autograd
keeps of them is more than half of what a layer keeps. A function is run again as it is, so that outputs
and gradients are those of the function itself, bit by bit. All that is needed of it is that it gives the
same output for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.numerics import composes

_ORIGIN = "_nbpeft_origin"
"""Attribute of an output that can be computed again: how, and from what."""
_PARTS = 8
"""In how many parts at most the gradient of what acts on each number alone is computed."""
_LEAST_PART = 1 << 16
"""Numbers of a part, or a multiple: processors compute several at once, and what is left at the end by other code."""


class Recomputation:
    """One call of a function, to be repeated in the backward pass.

    Backward needs the output for the weights of whoever reads it, and then the function's own gradient. The
    first of them repeats the call, the last reader drops the output, and the function's own gradient all else. Where
    that is computed in parts, nothing but the output is left between them.

    Args:
        function: takes ``inputs``, returns a tensor; the same for the same inputs.
        inputs: those of this call.
        pointwise: whether it acts on each number alone, and all inputs have the shape of the output: its gradient
            is then computed in parts, which need no room beside it.

    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pointwise: bool = False) -> None:
        self._function, self._pointwise = function, pointwise
        self._readers = self._read = 0
        self._device_type = inputs[0].device.type
        self._autocast = _autocast_dtype(self._device_type)
        self._needed = tuple(tensor.requires_grad for tensor in inputs)
        self._output: Tensor | None = None
        self._graph: tuple[list[Tensor], Any] | None = None

    def add_reader(self) -> None:
        """Notes that one more will ask for the output in a backward pass."""
        self._readers += 1

    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, detached.

        Args:
            inputs: as they were kept.
        """
        if self._output is None:
            self._output, self._read = self._repeat(inputs), 0
        output = self._output
        self._read += 1
        if self._read >= self._readers:
            self._output = None
        return output

    def gradients(self, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, None for one that needs none.

        Args:
            inputs: as they were kept.
            upstream: gradient of the output.
        """
        self._output = None
        if self._pointwise:
            return self._gradients_in_parts(inputs, upstream)
        if self._graph is None:
            self._repeat(inputs)
        (leaves, edge), self._graph = self._graph, None  # type: ignore[misc]
        return self._gradients(leaves, edge, upstream)

    def differentiable_output(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output as a function of the inputs, for derivatives of higher order."""
        with self._as_before():
            return self._function(*inputs)

    def differentiable_gradients(self, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
        """The gradients as functions of inputs and ``upstream``."""
        return self._gradients(inputs, self.differentiable_output(inputs), upstream, create_graph=True)

    def _repeat(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, detached; what its gradient needs is held until that is computed."""
        with torch.set_grad_enabled(not self._pointwise), self._as_before():
            leaves = self._leaves(inputs)
            output = self._function(*leaves)
        if not self._pointwise:
            self._graph = leaves, torch.autograd.graph.get_gradient_edge(output)
        return output.detach()

    def _leaves(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, self._needed, strict=True)]

    def _gradients(
        self, inputs: Sequence[Tensor], output: Any, upstream: Tensor, *, create_graph: bool = False
    ) -> list[Tensor | None]:
        needed = [tensor for tensor, need in zip(inputs, self._needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, needed, upstream, create_graph=create_graph))
        return [next(found) if need else None for need in self._needed]

    def _gradients_in_parts(self, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
        found = [
            torch.empty_like(one, memory_format=torch.contiguous_format) if need else None
            for one, need in zip(inputs, self._needed, strict=True)
        ]
        places = [None if one is None else one.view(-1) for one in found]
        numbers, passed = [one.detach().reshape(-1) for one in inputs], upstream.reshape(-1)
        size = -(-len(passed) // _PARTS)
        size = max(size + -size % _LEAST_PART, _LEAST_PART)
        for start in range(0, len(passed), size):
            part = slice(start, start + size)
            with torch.enable_grad(), self._as_before():
                leaves = self._leaves([one[part] for one in numbers])
                output = self._function(*leaves)
            for place, new in zip(places, self._gradients(leaves, output, passed[part]), strict=True):
                if place is not None and new is not None:
                    place[part] = new
        return found

    def _as_before(self) -> AbstractContextManager[Any]:
        """Autocast as it was in the forward pass: backward runs outside of it, as a rule."""
        if self._autocast == _autocast_dtype(self._device_type):
            return nullcontext()
        return torch.autocast(self._device_type, self._autocast, enabled=self._autocast is not None)


class _RowsAgain:
    """Some rows of what a call returns."""

    def __init__(self, whole: Recomputation | _RowsAgain, rows: slice) -> None:
        self._whole, self._rows = whole, rows

    def add_reader(self) -> None:
        """See ``Recomputation``."""
        self._whole.add_reader()

    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """See ``Recomputation``."""
        return self._whole.output(inputs)[self._rows]

    def differentiable_output(self, inputs: Sequence[Tensor]) -> Tensor:
        """See ``Recomputation``."""
        return self._whole.differentiable_output(inputs)[self._rows]


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        recomputation: computes it again.
        inputs: what from; kept for the backward anyway.
        version: of the tensor: one that was changed since cannot be computed again.
    """

    recomputation: Recomputation | _RowsAgain
    inputs: tuple[Tensor, ...]
    version: int


class _Recompute(torch.autograd.Function):
    """A function's output; keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], recomputation: Recomputation, *inputs: Tensor) -> Tensor:
        ctx.recomputation = recomputation
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recomputation: Recomputation = ctx.recomputation
        find = recomputation.differentiable_gradients if torch.is_grad_enabled() else recomputation.gradients
        return None, None, *find(ctx.saved_tensors, gradients[0])


def recompute(function: Callable[..., Tensor], *inputs: Tensor, pointwise: bool = False) -> Tensor:
    """``function(*inputs)``, of which autograd keeps the inputs alone.

    Args:
        function: takes tensors, returns a new one, the same for the same; what else it reads is not trained.
        *inputs: tensors of one device, any shapes and dtypes.
        pointwise: whether it acts on each number alone, see ``Recomputation``.

    Returns:
        What the function returns.
    """
    if composes() or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return function(*inputs)
    pointwise = pointwise and all(tensor.shape == inputs[0].shape for tensor in inputs)
    recomputation = Recomputation(function, inputs, pointwise)
    output: Tensor = _Recompute.apply(function, recomputation, *inputs)  # type: ignore[no-untyped-call]
    setattr(output, _ORIGIN, Origin(recomputation, inputs, output._version))
    return output


def origin_of(tensor: Tensor) -> Origin | None:
    """How a tensor is computed again, or None where it has to be kept."""
    origin: Origin | None = getattr(tensor, _ORIGIN, None)
    return origin if origin is not None and origin.version == tensor._version else None


def parts_of(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """``tensor.split(sizes)``, computed again where the tensor is."""
    parts, origin, start = list(torch.split(tensor, list(sizes))), origin_of(tensor), 0
    for part in parts if origin is not None else ():
        again = _RowsAgain(origin.recomputation, slice(start, start + len(part)))  # type: ignore[union-attr]
        setattr(part, _ORIGIN, Origin(again, origin.inputs, part._version))  # type: ignore[union-attr]
        start += len(part)
    return parts


def detached(tensor: Tensor) -> Tensor:
    """``tensor.detach()``, computed again where the tensor is."""
    part, origin = tensor.detach(), origin_of(tensor)
    if origin is not None:
        setattr(part, _ORIGIN, Origin(origin.recomputation, origin.inputs, part._version))
    return part


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast, or None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
