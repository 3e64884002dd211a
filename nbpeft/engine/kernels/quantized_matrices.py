"""A tensor of several matrices (the experts of a mixture), each quantized separately: nf4, fp4 or int8.

It replaces the parameter ``(experts, rows, columns)`` and has its shape and dtype. Indexing (``weight[expert]``,
``weight[experts]``) and transposing give quantized tensors again. A product dequantizes the experts that it needs, one
after the other, and drops them afterwards; backward dequantizes them again. Every other operation works on a
dequantized copy.

References: QLoRA, https://arxiv.org/abs/2305.14314; LLM.int8(), https://arxiv.org/abs/2208.07339 (its rows of int8; the
inputs stay floating).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nbpeft._util.optional import needs
from nbpeft.engine.kernels.four_bit import NESTED_BLOCK, fitted
from nbpeft.errors import ConfigError

BLOCK = 64
"""Numbers in a 4-bit block, in row-major order, that share a constant."""
_CODES = 127
_NAMES = ("codes", "constants", "nested", "offset", "table")
"""Names of all tensors that a quantized one may consist of; each has an entry for each matrix, except the table."""


@dataclass(frozen=True)
class Form:
    """The storage format of each matrix, and its orientation.

    Attributes:
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether 4-bit constants are quantized too (double quantization).
        rows: number of rows of a stored matrix.
        columns: number of columns of a stored matrix.
        transposed: whether the tensor shows the transposed of the stored matrices.
    """

    kind: str
    double: bool
    rows: int
    columns: int
    transposed: bool = False

    @property
    def label(self) -> str:
        """The format for users, such as ``nf4 double`` or ``int8``."""
        return f"{self.kind} double" if self.double else self.kind

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of one matrix of the tensor, ``transposed`` applied."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    def byte_count(self, count: int) -> int:
        """Bytes of ``count`` quantized matrices, including all constants."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(count).values())

    def layout(self, count: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that ``count`` matrices are stored in: name -> (shape, dtype)."""
        if self.kind == "int8":
            shape = (count, self.rows, self.columns)
            return {"codes": (shape, torch.int8), "constants": (shape[:2], torch.float32)}
        numbers = self.rows * self.columns
        blocks = -(-numbers // BLOCK)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((count, -(-numbers // 2)), torch.uint8)}
        if not self.double:
            return found | {"constants": ((count, blocks), torch.float32)}
        nested = ((count, -(-blocks // NESTED_BLOCK)), torch.float32)
        parts = {"constants": ((count, blocks), torch.uint8), "nested": nested}
        return found | parts | {"offset": ((count,), torch.float32), "table": ((256,), torch.float32)}

    def quantized(self, matrix: Tensor, *, fit: bool = False) -> dict[str, Tensor]:
        """Quantizes one matrix.

        Args:
            matrix: floating-point, (rows, columns).
            fit: for 4-bit blocks use the constants that bring the codes nearest to the matrix (least squares), instead
                of the largest magnitudes.

        Returns:
            Name -> tensor, as in ``layout`` without the first dimension.
        """
        if self.kind == "int8":
            largest = matrix.float().abs().amax(1)
            codes = (matrix.float() * (_CODES / largest.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round_()
            return {"codes": codes.to(torch.int8), "constants": largest}
        functional = _bitsandbytes().functional
        known = matrix.dtype in (torch.float32, torch.bfloat16, torch.float16)
        matrix = (matrix if known else matrix.float()).contiguous()
        codes, state = functional.quantize_4bit(
            matrix, blocksize=BLOCK, compress_statistics=False, quant_type=self.kind, quant_storage=torch.uint8
        )
        constants = fitted(matrix, codes, state.absmax, BLOCK, self.kind) if fit else state.absmax
        if not self.double:
            return {"codes": codes.view(-1), "constants": constants}
        offset = constants.mean()
        constants, inner = functional.quantize_blockwise(constants - offset, blocksize=NESTED_BLOCK)
        return {
            "codes": codes.view(-1),
            "constants": constants,
            "nested": inner.absmax,
            "offset": offset,
            "table": inner.code,
        }

    def dequantized(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Dequantizes one matrix.

        Args:
            parts: what ``quantized`` returned.
            dtype: dtype of the result.

        Returns:
            (rows, columns).
        """
        if self.kind == "int8":
            return (parts["codes"].float() * (parts["constants"] * (1.0 / _CODES))[:, None]).to(dtype)
        _bitsandbytes()
        constants = parts["constants"]
        if self.double:
            constants = torch.ops.bitsandbytes.dequantize_blockwise.default(
                constants, parts["nested"], parts["table"], NESTED_BLOCK, torch.float32
            )
            constants = constants + parts["offset"]
        numbers = self.rows * self.columns
        # As rows of one block each, or as a single row: for other shapes bitsandbytes' CPU kernel starts a new block
        # in each row.
        shape = (numbers // BLOCK, BLOCK) if numbers % BLOCK == 0 else (2 * parts["codes"].numel(),)
        matrix: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            parts["codes"], constants, BLOCK, self.kind, shape, dtype
        )
        return matrix.reshape(-1)[:numbers].view(self.rows, self.columns)


def _bitsandbytes() -> Any:
    """Imports bitsandbytes, which registers its operators with torch."""
    with needs("bitsandbytes", "A weight in 4 bits"):
        return importlib.import_module("bitsandbytes")


class QuantizedMatrices(Tensor):
    """Quantized matrices (n, rows, columns), or a single one (rows, columns); see the module's docstring.

    Attributes:
        form: the storage format.
        picked: int64 indices of the stored matrices that this tensor consists of, (n,); None for all in order.
    """

    form: Form
    picked: Tensor | None

    def __new__(
        cls,
        parts: Mapping[str, Tensor],
        form: Form,
        dtype: torch.dtype,
        *,
        picked: Tensor | None = None,
        single: bool = False,
    ) -> Self:
        """Creates the tensor from its stored parts.

        Args:
            parts: the tensors of ``Form.layout``, by name.
            form: the storage format.
            dtype: the floating-point dtype that the tensor has and is dequantized to.
            picked: see the class.
            single: whether the tensor is a single matrix, without the first dimension.
        """
        count = len(parts["codes"] if picked is None else picked)
        rows, columns = form.shape
        inner = (1, rows) if form.transposed else (columns, 1)
        found: Self = Tensor._make_wrapper_subclass(
            cls,
            form.shape if single else (count, *form.shape),
            strides=inner if single else (rows * columns, *inner),
            dtype=dtype,
            device=parts["codes"].device,
        )
        found.__dict__.update(parts, form=form, picked=picked)
        return found

    @classmethod
    def of(cls, weight: Tensor, kind: str, *, double: bool = False, device: torch.device | None = None) -> Self:
        """Quantizes a tensor, one matrix after the other.

        Args:
            weight: floating-point, (n, rows, columns); it is not changed.
            kind: ``nf4``, ``fp4`` or ``int8``.
            double: whether 4-bit constants are quantized too.
            device: where to quantize and store it; by default that of ``weight``.

        Returns:
            The quantized tensor, with the dtype of ``weight``.
        """
        form = Form(kind, double and kind != "int8", *weight.shape[1:])
        parts = {
            name: torch.empty(shape, dtype=dtype, device=device or weight.device)
            for name, (shape, dtype) in form.layout(len(weight)).items()
        }
        found = cls(parts, form, weight.dtype)
        found.write(weight, fit=False)
        return found

    @property
    def parts(self) -> dict[str, Tensor]:
        """Name -> tensor that it is stored in."""
        return {name: self.__dict__[name] for name in _NAMES if name in self.__dict__}

    @property
    def count(self) -> int:
        """Number of stored matrices."""
        return len(self.parts["codes"])

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of its storage, including all constants."""
        return sum(part.nbytes for part in self.parts.values())

    @torch.no_grad()
    def write(self, weight: Tensor, *, fit: bool) -> None:
        """Quantizes another tensor into the same storage.

        Args:
            weight: floating-point, of the same shape.
            fit: see ``Form.quantized``.

        Raises:
            ConfigError: the shape differs, or this tensor is a selection of the stored matrices.
        """
        if self.picked is not None or weight.shape != self.shape:
            raise ConfigError(f"cannot store {tuple(weight.shape)} in quantized matrices {tuple(self.shape)}")
        parts = self.parts
        for i, matrix in enumerate(weight if weight.ndim == 3 else weight[None]):
            stored = matrix.detach().to(self.device)
            for name, value in self.form.quantized(stored.t() if self.form.transposed else stored, fit=fit).items():
                (parts[name] if name == "table" else parts[name][i]).copy_(value)

    def matrix(self, i: int, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantizes a stored matrix.

        Args:
            i: index of the stored matrix.
            dtype: to cast the result to; None for no cast.

        Returns:
            The matrix, ``transposed`` applied.
        """
        chosen = {name: part if name == "table" else part[i] for name, part in self.parts.items()}
        found = self.form.dequantized(chosen, self.dtype)
        found = found.t() if self.form.transposed else found
        return found if dtype is None else found.to(dtype)

    def dequantize(self) -> Tensor:
        """Dequantizes the whole tensor, to its shape and dtype."""
        if self.ndim == 2:
            return self.matrix(0)
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for i, places in self.uses():
            found[places] = self.matrix(i)
        return found

    def uses(self) -> Iterator[tuple[int, Any]]:
        """Yields (index of a stored matrix, its positions in the first dimension of this tensor)."""
        if self.picked is None:
            yield from ((i, slice(i, i + 1)) for i in range(self.count))
            return
        for i in torch.unique(self.picked).tolist():
            yield i, (self.picked == i).nonzero()[:, 0]

    def groups(self, offs: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
        """Yields the rows of a grouped product for each matrix that has any.

        Args:
            offs: (n,); the rows of matrix i end before ``offs[i]``.
            rows: number of all rows.

        Yields:
            (index of the matrix, its rows).
        """
        start = 0
        for i, end in enumerate(offs.tolist()):
            if end > start:
                yield i, slice(start, end)
            start = max(start, end)

    def like(self, parts: Mapping[str, Tensor] | None = None, **changes: Any) -> Self:
        """A tensor that differs from this one in some arguments of the constructor.

        Args:
            parts: the stored tensors; None for those of this one, which are then shared.
            **changes: ``form``, ``dtype``, ``picked`` or ``single``.

        Returns:
            The new tensor.
        """
        options: dict[str, Any] = {"form": self.form, "dtype": self.dtype, "picked": self.picked}
        options |= {"single": self.ndim == 2, **changes}
        return type(self)(self.parts if parts is None else parts, **options)

    def pick(self, i: int) -> Self:
        """The matrix at index ``i``, quantized, as a view of the storage."""
        i = int(i if self.picked is None else self.picked[i])
        i = i + self.count if i < 0 else i
        parts = {name: part if name == "table" else part[i : i + 1] for name, part in self.parts.items()}
        return self.like(parts, picked=None, single=True)

    def mapped(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        """A tensor of which each stored tensor, and ``picked``, is passed through a function.

        Args:
            change: applied to each of them.
            dtype: dtype of the new tensor; None for that of this one.

        Returns:
            The new tensor.
        """
        picked = None if self.picked is None else change(self.picked)
        parts = {name: change(part) for name, part in self.parts.items()}
        return self.like(parts, picked=picked, dtype=dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [*self.parts, *(("picked",) if self.picked is not None else ())]
        return names, (self.form, self.dtype, self.ndim == 2)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Self:
        form, dtype, single = context
        parts = {name: inner[name] for name in _NAMES if name in inner}
        return cls(parts, form, dtype, picked=inner.get("picked"), single=single)

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, torch.nn.Parameter)
        return _rebuilt, (type(self), self.parts, self.form, self.dtype, self.picked, self.ndim == 2, is_parameter)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.form.label} of {self.dtype}, device={self.device})"

    # Operations are handled below autograd (`__torch_dispatch__`); for autograd this is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation.

        Indexing and moving keep the result quantized, products dequantize one matrix at a time, and every other
        operation gets a dequantized copy.
        """
        kwargs = kwargs or {}
        handled = _HANDLED.get(str(function.overloadpacket))
        if handled is not None:
            found = handled(function, *args, **kwargs)
            if found is not NotImplemented:
                return found
        _refuse_writing(function, args, kwargs)
        return function(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def _rebuilt(
    cls: type[QuantizedMatrices],
    parts: dict[str, Tensor],
    form: Form,
    dtype: torch.dtype,
    picked: Tensor | None,
    single: bool,
    is_parameter: bool,
) -> Tensor:
    """Creates the tensor when it is unpickled."""
    found = cls(parts, form, dtype, picked=picked, single=single)
    return torch.nn.Parameter(found, requires_grad=False) if is_parameter else found


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedMatrices) else value


def _refuse_writing(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ConfigError for an operation that would write to a dequantized copy, where the result would be lost."""
    schema = function._schema
    if not schema.is_mutable:
        return
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    for argument in schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(given.get(argument.name), QuantizedMatrices):
            raise ConfigError(
                f"{schema.name} would write into experts stored in {given[argument.name].form.label}: "
                "they are frozen; train an adapter on them (target_parameters), or merge one"
            )


# Operations that do not dequantize the whole tensor


def _same(function: Any, weight: Any) -> Any:
    return weight.like()


def _cloned(function: Any, weight: Any, **options: Any) -> Any:
    return weight.mapped(torch.clone)


def _moved(function: Any, weight: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    blocking = not options.get("non_blocking", False)
    return weight.mapped(lambda part: part.to(device or part.device, copy=True, non_blocking=not blocking), dtype)


def _turned(function: Any, weight: Any, *dims: int) -> Any:
    last = {weight.ndim - 2, weight.ndim - 1}
    if {dim % weight.ndim for dim in dims} != last and (dims or weight.ndim != 2):
        return NotImplemented
    return weight.like(form=replace(weight.form, transposed=not weight.form.transposed))


def _selected(function: Any, weight: Any, dim: int, index: int) -> Any:
    return weight.pick(index) if weight.ndim == 3 and dim % 3 == 0 else NotImplemented


def _unbound(function: Any, weight: Any, dim: int = 0) -> Any:
    return [weight.pick(i) for i in range(len(weight))] if weight.ndim == 3 and dim % 3 == 0 else NotImplemented


def _indexed(function: Any, weight: Any, indices: Sequence[Tensor | None]) -> Any:
    chosen = indices[0] if len(indices) == 1 and isinstance(weight, QuantizedMatrices) else None
    integers = (torch.int64, torch.int32)
    if chosen is None or weight.ndim != 3 or chosen.ndim != 1 or chosen.dtype not in integers:
        return NotImplemented
    chosen = torch.where(chosen < 0, chosen + len(weight), chosen)
    return weight.like(picked=chosen if weight.picked is None else weight.picked[chosen])


def _copied(function: Any, target: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, QuantizedMatrices):
        return NotImplemented
    given: Any = source if isinstance(source, QuantizedMatrices) and source.picked is target.picked is None else None
    if given is not None and given.form == target.form and given.shape == target.shape:
        for name, part in target.parts.items():
            part.copy_(given.parts[name])
    else:
        target.write(_dense(source), fit=False)
    return target


def _made_like(function: Any, weight: Any, *args: Any, **options: Any) -> Any:
    if not isinstance(weight, QuantizedMatrices):
        return NotImplemented
    shape = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return function(shape, *args, **options)


def _multiplied(function: Any, *args: Any, **options: Any) -> Any:
    """Products with a single matrix."""
    dtype = next(
        value.dtype for value in args if isinstance(value, Tensor) and not isinstance(value, QuantizedMatrices)
    )
    cast = [value.matrix(0, dtype) if isinstance(value, QuantizedMatrices) else value for value in args]
    return function(*cast, **options)


def _batched(function: Any, first: Any, second: Any) -> Any:
    """``bmm``: products with several matrices, dequantized one after the other."""
    if isinstance(first, QuantizedMatrices) and isinstance(second, QuantizedMatrices):
        return NotImplemented
    weight, x = (first, second) if isinstance(first, QuantizedMatrices) else (second, first)
    output: Tensor = x.new_empty(len(x), first.shape[1], second.shape[2])
    for i, places in weight.uses():
        matrix = weight.matrix(i, x.dtype)
        output[places] = matrix @ x[places] if weight is first else x[places] @ matrix
    return output


def _grouped(
    function: Any, x: Tensor, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Grouped product: rows of ``x``, (rows, in), each times the matrix (in, out) of its group."""
    known = isinstance(weight, QuantizedMatrices) and weight.ndim == 3 and weight.picked is None
    if not known or offs is None or x.ndim != 2 or bias is not None:
        return NotImplemented
    output = x.new_zeros(len(x), weight.shape[2], dtype=out_dtype or x.dtype)
    for i, rows in weight.groups(offs, len(x)):
        output[rows] = x[rows] @ weight.matrix(i, x.dtype)
    return output


def _grouped_backward(function: Any, x: Tensor, weight: Any, offs: Tensor, gradient: Tensor) -> Any:
    """Backward of transformers' own grouped product: the gradient of the input; that of the weight is not needed."""
    if not isinstance(weight, QuantizedMatrices):
        return NotImplemented
    found = _grouped(None, gradient, _turned(None, weight, 1, 2), offs)
    return found, gradient.new_zeros(()).expand(weight.shape)


_HANDLED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("aten.detach", "aten.alias"), _same),
    "aten.clone": _cloned,
    "aten._to_copy": _moved,
    **dict.fromkeys(("aten.t", "aten.transpose"), _turned),
    "aten.select": _selected,
    "aten.unbind": _unbound,
    "aten.index": _indexed,
    "aten.copy_": _copied,
    **dict.fromkeys(("aten.empty_like", "aten.zeros_like", "aten.new_empty", "aten.new_zeros"), _made_like),
    **dict.fromkeys(("aten.mm", "aten.addmm"), _multiplied),
    "aten.bmm": _batched,
    **dict.fromkeys(("aten._grouped_mm", "transformers.grouped_mm_fallback"), _grouped),
    "transformers.grouped_mm_fallback_backward": _grouped_backward,
}
"""Operator -> its implementation, which returns NotImplemented if a dequantized copy is needed after all."""
