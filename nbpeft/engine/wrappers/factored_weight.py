"""A weight plus low-rank products that stay factored, so that only what a matrix product needs is computed.

The experts of a mixture read their parameter as ``weight[expert]``, ``weight[experts]`` or as a whole, and multiply. A
``FactoredWeight`` replaces the parameter there: ``x @ (W + s L R)`` is computed as ``x @ W + s (x @ L) @ R``, only for
the experts that get tokens. Every other operation works on the sum as a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.kernels.numerics import composes, without_autocast
from nbpeft.engine.kernels.storage import loaded
from nbpeft.errors import AdapterError

_OF_THE_WEIGHT = frozenset(
    ("shape", "dtype", "device", "ndim", "size", "dim", "is_cuda", "requires_grad", "layout", "numel", "data_ptr")
)
"""Attributes that are the same for the sum and the weight, so that the sum need not be computed for them."""


class Product(NamedTuple):
    """``scale * left @ right``, with dropout on the input that it is multiplied by.

    Attributes:
        left: (…, rows, r).
        right: (…, r, columns).
        scale: factor on the product.
        dropout: probability of dropout on the input.
    """

    left: Tensor
    right: Tensor
    scale: float | Tensor = 1.0
    dropout: float = 0.0

    def transposed(self) -> Product:
        """The transposed product."""
        return self._replace(left=self.right.transpose(-2, -1), right=self.left.transpose(-2, -1))

    def picked(self, index: Any) -> Product:
        """The product for one or some of several weights, by index in the first dimension."""
        return self._replace(left=self.left[index], right=self.right[index])

    def cast(self, dtype: torch.dtype) -> Product:
        """The product with both factors in another dtype."""
        return self._replace(left=self.left.to(dtype), right=self.right.to(dtype))

    def dropped(self, x: Tensor) -> Tensor:
        """Applies ``dropout`` to the input."""
        return F.dropout(x, self.dropout) if self.dropout else x

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight`` plus the product, as a new tensor in the dtype of ``weight``."""
        left, right, scale, _ = self.cast(weight.dtype)
        with without_autocast(weight.device.type):
            if isinstance(scale, Tensor) or weight.ndim not in (2, 3):
                return weight + (left * scale) @ right
            add: Callable[..., Tensor] = torch.addmm if weight.ndim == 2 else torch.baddbmm
            return add(weight, left, right, alpha=scale)


class AdaptsParameters(ABC):
    """An adapter of a bare parameter, which adds to the weight because its module is not a layer."""

    @abstractmethod
    def parameter_products(self, base: BaseLayer) -> Sequence[Product]:
        """The products to add to the parameter; differentiable."""


class FactoredWeight:
    """``weight`` plus products, with the operations of a tensor; see the module's docstring.

    Args:
        weight: (rows, columns), or several of them (n, rows, columns).
        products: the products to add.
    """

    def __init__(self, weight: Tensor, products: Sequence[Product]) -> None:
        self.weight, self.products = weight, tuple(products)
        self._parts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None

    def summed(self) -> Tensor:
        """The sum as a tensor.

        Raises:
            AdapterError: a product has dropout, which applies to inputs and not to a weight.
        """
        if any(product.dropout for product in self.products):
            raise AdapterError(
                "lora_dropout on a bare parameter is only supported in matrix products, and its module uses it "
                "otherwise: train with lora_dropout=0"
            )
        total = self.weight
        for product in self.products:
            total = product.added_to(total)
        return total

    def transpose(self, first: int, second: int) -> Any:
        """See ``Tensor.transpose``."""
        if {first % self.weight.ndim, second % self.weight.ndim} != {self.weight.ndim - 2, self.weight.ndim - 1}:
            return self.summed().transpose(first, second)
        products = [product.transposed() for product in self.products]
        return FactoredWeight(self.weight.transpose(first, second), products)

    @property
    def mT(self) -> Any:
        """See ``Tensor.mT``."""
        return self.transpose(-2, -1)

    def __getitem__(self, index: Any) -> Any:
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        if self.weight.ndim != 3 or not (single or _is_list(index)):
            return self.summed()[index]
        if single:
            return FactoredWeight(self.weight[index], self._at(int(index)))
        return FactoredWeight(self.weight[index], [product.picked(index) for product in self.products])

    def _at(self, index: int) -> list[Product]:
        if not torch.is_grad_enabled():
            return [product.picked(index) for product in self.products]
        # Split once with `unbind`: the backward of each single indexing would allocate a gradient of the full size.
        if self._parts is None:
            self._parts = [(product.left.unbind(), product.right.unbind()) for product in self.products]
        parts = zip(self.products, self._parts, strict=True)
        return [product._replace(left=left[index], right=right[index]) for product, (left, right) in parts]

    def __matmul__(self, other: Tensor) -> Tensor:
        return _product(torch.matmul, self, other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in _OF_THE_WEIGHT else self.summed(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes matrix products with the factors, and every other function with the sum."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_")
        handled = _PRODUCTS.get(name)
        if handled is not None:
            found = handled(function, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return function(*map(_summed, args), **{key: _summed(value) for key, value in kwargs.items()})


def _summed(value: Any) -> Any:
    return value.summed() if isinstance(value, FactoredWeight) else value


def _is_list(index: Any) -> bool:
    return isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int64, torch.int32)


def _plus(base: Tensor, delta: Tensor) -> Tensor:
    """``base + delta``, in place, because ``base`` is a new tensor that nothing else uses."""
    return base + delta if composes() else base.add_(delta.to(base.dtype))


def _product(function: Any, first: Any, second: Any, **options: Any) -> Any:
    """``first @ second`` where one of them is factored."""
    if options or (isinstance(first, FactoredWeight) and isinstance(second, FactoredWeight)):
        return NotImplemented
    if isinstance(second, FactoredWeight):
        total = function(first, second.weight)
        for product in second.products:
            left, right, scale, _ = product.cast(first.dtype)
            total = _plus(total, function(function(product.dropped(first), left) * scale, right))
    else:
        total = function(first.weight, second)
        for product in first.products:
            left, right, scale, _ = product.cast(second.dtype)
            total = _plus(total, function(left, function(right, product.dropped(second)) * scale))
    return total


def _linear(function: Any, x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, FactoredWeight) or not isinstance(x, Tensor):
        return NotImplemented
    total = F.linear(x, weight.weight, bias)
    for product in weight.products:
        left, right, scale, _ = product.cast(x.dtype)
        total = _plus(total, F.linear(F.linear(product.dropped(x), right) * scale, left))
    return total


def _grouped(function: Any, x: Tensor, weight: Any, offs: Tensor | None = None, **options: Any) -> Any:
    """Grouped product: rows of ``x``, (rows, in), times a weight, (n, in, out); group i ends before ``offs[i]``."""
    known = isinstance(weight, FactoredWeight) and weight.weight.ndim == 3 and x.ndim == 2
    if offs is None or not known or any(value is not None for value in options.values()):
        return NotImplemented
    total = function(x, weight.weight, offs=offs)
    for product in weight.products:
        delta = grouped_product(product.dropped(x), product.left, product.right, offs)
        total = _plus(total, delta * product.scale)
    return total


def grouped_product(x: Tensor, left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """Computes ``x @ left[i] @ right[i]`` for the rows of each group i; empty groups cost nothing.

    Args:
        x: (rows, in), sorted by group.
        left: (n, in, r).
        right: (n, r, out).
        offs: int tensor, (n,): the end of each group.

    Returns:
        (rows, out) in the dtype of ``x``.
    """
    fake = isinstance(offs, loaded("torch._subclasses.fake_tensor", "FakeTensor"))
    ends = [len(x)] if fake else offs.tolist()  # in a memory estimate one group, which takes as much as all groups
    groups = [(i, slice(start, end)) for i, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]  # noqa: B905
    if composes():
        parts = [x[rows] @ left[i].to(x.dtype) @ right[i].to(x.dtype) for i, rows in groups]
        return F.pad(torch.cat(parts), (0, 0, 0, len(x) - ends[-1])) if parts else x.new_zeros(len(x), right.shape[2])
    with without_autocast(x.device.type):
        return _Grouped.apply(x, left, right, groups)


class _Grouped(torch.autograd.Function):
    """``grouped_product``; the gradients of all groups are written to one tensor for each argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, groups: list[tuple[int, slice]]) -> Tensor:
        hidden = x.new_zeros(len(x), left.shape[2])
        output = x.new_zeros(len(x), right.shape[2])
        for i, rows in groups:
            # ``out`` is possible because gradients are disabled in the forward of a custom function.
            torch.mm(x[rows], left[i].to(x.dtype), out=hidden[rows])
            torch.mm(hidden[rows], right[i].to(x.dtype), out=output[rows])
        ctx.save_for_backward(x, left, right, hidden)
        ctx.groups = groups
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, hidden = ctx.saved_tensors
        output = gradients[0].to(x.dtype)
        needed = zip((x, left, right), ctx.needs_input_grad, strict=False)
        of_x, of_left, of_right = (torch.zeros_like(tensor) if need else None for tensor, need in needed)
        for i, rows in ctx.groups:
            if of_right is not None:
                of_right[i] = hidden[rows].T @ output[rows]
            of_hidden = output[rows] @ right[i].to(x.dtype).T
            if of_left is not None:
                of_left[i] = x[rows].T @ of_hidden
            if of_x is not None:
                of_x[rows] = of_hidden @ left[i].to(x.dtype).T
        return of_x, of_left, of_right, None


_PRODUCTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm"), _product),
    "linear": _linear,
    **dict.fromkeys(("grouped_mm", "grouped_mm_fallback"), _grouped),
}
