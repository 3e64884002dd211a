"""Tensors that the backward pass computes again instead of storing them.

    hidden = recompute(product, gate, up)     # product(gate, up); autograd stores only gate and up
    origin_of(hidden)                         # an operation that needs hidden in backward can store gate and up, too

Activation functions and norms take almost no time compared with the matrix products around them, but
what autograd stores for them is more than half of the memory of a layer. The function itself runs again,
so outputs and gradients are the same bit for bit. It must return the same output for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.numerics import autocast_dtype, composes

_ORIGIN = "_nbpeft_origin"
"""Attribute of a tensor that can be computed again; its value is an ``Origin``."""
_PARTS = 8
"""The largest number of parts in which the gradient of a pointwise function is computed."""
_LEAST_PART = 1 << 16
"""The size of a part is a multiple of this.

Vectorized kernels compute a remainder with other code, whose results can differ in the last bit.
"""


class Recomputation:
    """One call of a function, to be repeated in the backward pass.

    In backward the operations that read the output (readers) need it for the gradients of their weights, and
    afterwards the function's own gradient is computed. The first reader repeats the call. The last reader frees the
    output, and the function's own gradient frees everything else. For a pointwise function only the output is stored
    in between.

    Args:
        function: takes ``inputs`` and returns a tensor, always the same for the same inputs.
        inputs: inputs of this call.
        pointwise: whether each number of the output depends only on the same position of the inputs, all of the same
            shape. The gradient is then computed in parts, which needs little additional memory.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pointwise: bool = False) -> None:
        self._function, self._pointwise = function, pointwise
        self._readers = self._read = 0
        self._device_type = inputs[0].device.type
        self._autocast = autocast_dtype(self._device_type)
        self._needed = tuple(tensor.requires_grad for tensor in inputs)
        self._output: Tensor | None = None
        self._graph: tuple[list[Tensor], Any] | None = None

    def add_reader(self) -> None:
        """Registers one more operation that will read the output in backward."""
        self._readers += 1

    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, detached, for one reader.

        Args:
            inputs: inputs of the call, as autograd stored them.
        """
        if self._output is None:
            self._output, self._read = self._repeat(inputs), 0
        output = self._output
        self._read += 1
        if self._read >= self._readers:
            self._output = None
        return output

    def gradients(self, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs.

        Args:
            inputs: inputs of the call, as autograd stored them.
            upstream: gradient of the output.

        Returns:
            One for each input; None for one that does not require a gradient.
        """
        self._output = None
        if self._pointwise:
            return self._gradients_in_parts(inputs, upstream)
        if self._graph is None:
            self._repeat(inputs)
        (leaves, edge), self._graph = self._graph, None  # type: ignore[misc]
        return self._gradients(leaves, edge, upstream)

    def differentiable_output(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output with a graph back to the inputs, for derivatives of higher order."""
        with self._as_before():
            return self._function(*inputs)

    def differentiable_gradients(self, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
        """The gradients with a graph back to the inputs and ``upstream``, for derivatives of higher order."""
        return self._gradients(inputs, self.differentiable_output(inputs), upstream, create_graph=True)

    def _repeat(self, inputs: Sequence[Tensor]) -> Tensor:
        """Runs the function again and returns its output, detached; the graph is stored unless it is pointwise."""
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
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
            for tensor, need in zip(inputs, self._needed, strict=True)
        ]
        places = [None if gradient is None else gradient.view(-1) for gradient in found]
        numbers, passed = [tensor.detach().reshape(-1) for tensor in inputs], upstream.reshape(-1)
        size = -(-len(passed) // _PARTS)
        size = max(size + -size % _LEAST_PART, _LEAST_PART)
        for start in range(0, len(passed), size):
            part = slice(start, start + size)
            with torch.enable_grad(), self._as_before():
                leaves = self._leaves([flat[part] for flat in numbers])
                output = self._function(*leaves)
            for place, new in zip(places, self._gradients(leaves, output, passed[part]), strict=True):
                if place is not None and new is not None:
                    place[part] = new
        return found

    def _as_before(self) -> AbstractContextManager[Any]:
        """Context manager: autocast as in the forward pass; backward usually runs outside of its block."""
        if self._autocast == autocast_dtype(self._device_type):
            return nullcontext()
        return torch.autocast(self._device_type, self._autocast, enabled=self._autocast is not None)


class _RowsAgain:
    """Some rows of the output of a ``Recomputation``, with the same methods for readers."""

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
    """How to compute a tensor again.

    Attributes:
        recomputation: computes it.
        inputs: the function's inputs, which autograd stores anyway.
        version: version counter of the tensor when it was created; a tensor written to since then is not recomputed.
    """

    recomputation: Recomputation | _RowsAgain
    inputs: tuple[Tensor, ...]
    version: int


class _Recompute(torch.autograd.Function):
    """Calls a function; autograd stores only its inputs."""

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
    """Computes ``function(*inputs)``; autograd stores only the inputs, and backward calls the function again.

    Args:
        function: takes tensors and returns a new one, always the same for the same inputs. Other tensors that it reads
            get no gradient.
        *inputs: tensors on one device, any shapes and dtypes.
        pointwise: see ``Recomputation``.

    Returns:
        What the function returns.
    """
    if composes() or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return function(*inputs)
    pointwise = pointwise and all(tensor.shape == inputs[0].shape for tensor in inputs)
    recomputation = Recomputation(function, inputs, pointwise)
    output: Tensor = _Recompute.apply(function, recomputation, *inputs)
    setattr(output, _ORIGIN, Origin(recomputation, inputs, output._version))
    return output


def origin_of(tensor: Tensor) -> Origin | None:
    """How to compute a tensor again; None if it has to be stored."""
    origin: Origin | None = getattr(tensor, _ORIGIN, None)
    return origin if origin is not None and origin.version == tensor._version else None


def parts_of(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """``tensor.split(sizes)``; if the tensor can be computed again, so can the parts.

    Args:
        tensor: any shape.
        sizes: sizes of the parts in the first dimension.

    Returns:
        The parts.
    """
    parts, origin, start = list(torch.split(tensor, list(sizes))), origin_of(tensor), 0
    for part in parts if origin is not None else ():
        again = _RowsAgain(origin.recomputation, slice(start, start + len(part)))  # type: ignore[union-attr]
        setattr(part, _ORIGIN, Origin(again, origin.inputs, part._version))  # type: ignore[union-attr]
        start += len(part)
    return parts


def detached(tensor: Tensor) -> Tensor:
    """``tensor.detach()``; if the tensor can be computed again, so can the result."""
    part, origin = tensor.detach(), origin_of(tensor)
    if origin is not None:
        setattr(part, _ORIGIN, Origin(origin.recomputation, origin.inputs, part._version))
    return part
