"""A weight plus products of thin matrices that are not multiplied out: only what a product touches is computed.

The experts of a mixture read their parameters as ``weight[expert]``, ``weight[experts]`` or whole, and multiply. A
``FactoredWeight`` stands for the parameter there: ``x @ (W + s L R)`` is computed as ``x @ W + s (x @ L) @ R``, for the
experts that tokens reach alone. Anything else that is done with it, is done with the sum.
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
"""Attributes that the sum has in common with the weight."""


class Product(NamedTuple):
    """``scale * left @ right``; what is multiplied with it is dropped out before.

    Attributes:
        left: (…, rows, r).
        right: (…, r, columns).
        scale: factor on the product.
        dropout: share of the input that is dropped.
    """

    left: Tensor
    right: Tensor
    scale: float | Tensor = 1.0
    dropout: float = 0.0

    def transposed(self) -> Product:
        """The product of the transposed."""
        return self._replace(left=self.right.transpose(-2, -1), right=self.left.transpose(-2, -1))

    def picked(self, index: Any) -> Product:
        """That of one of several weights, or of some."""
        return self._replace(left=self.left[index], right=self.right[index])

    def cast(self, dtype: torch.dtype) -> Product:
        """In another dtype."""
        return self._replace(left=self.left.to(dtype), right=self.right.to(dtype))

    def dropped(self, x: Tensor) -> Tensor:
        """What goes in: of each token a share of its features is zero, the others are as much larger."""
        return F.dropout(x, self.dropout) if self.dropout else x

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight`` plus the product, in its dtype."""
        left, right, scale, _ = self.cast(weight.dtype)
        with without_autocast(weight.device.type):
            if isinstance(scale, Tensor) or weight.ndim not in (2, 3):
                return weight + (left * scale) @ right
            add: Callable[..., Tensor] = torch.addmm if weight.ndim == 2 else torch.baddbmm
            return add(weight, left, right, alpha=scale)


class AdaptsParameters(ABC):
    """An adapter of a parameter whose module is no layer: there is no output to add to, only a weight."""

    @abstractmethod
    def parameter_products(self, base: BaseLayer) -> Sequence[Product]:
        """What it adds to the parameter, with gradients."""


class FactoredWeight:
    """``weight`` plus the products; see the module.

    Args:
        weight: (rows, columns), or several of them (n, rows, columns).
        products: added to it.
    """

    def __init__(self, weight: Tensor, products: Sequence[Product]) -> None:
        self.weight, self.products = weight, tuple(products)
        self._parts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None

    def summed(self) -> Tensor:
        """The sum as a tensor.

        Raises:
            AdapterError: something is to be dropped out, which a weight has no place for.
        """
        if any(product.dropout for product in self.products):
            raise AdapterError(
                "lora_dropout on a bare parameter acts in products alone, and its module does something else with it: "
                "train with lora_dropout=0"
            )
        total = self.weight
        for product in self.products:
            total = product.added_to(total)
        return total

    def transpose(self, first: int, second: int) -> Any:
        """As of a tensor."""
        if {first % self.weight.ndim, second % self.weight.ndim} != {self.weight.ndim - 2, self.weight.ndim - 1}:
            return self.summed().transpose(first, second)
        products = [product.transposed() for product in self.products]
        return FactoredWeight(self.weight.transpose(first, second), products)

    @property
    def mT(self) -> Any:
        """As of a tensor."""
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
        # Taken apart once: the gradient of each part alone would be as large as the whole.
        if self._parts is None:
            self._parts = [(product.left.unbind(), product.right.unbind()) for product in self.products]
        parts = zip(self.products, self._parts, strict=True)
        return [product._replace(left=left[index], right=right[index]) for product, (left, right) in parts]

    def __matmul__(self, other: Tensor) -> Tensor:
        product: Tensor = _product(torch.matmul, self, other)
        return product

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in _OF_THE_WEIGHT else self.summed(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiplies by way of the factors where it is a product, else does it with the sum."""
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
    """The sum, in the place of ``base``, which was just computed."""
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
    """Rows of ``x`` (rows, in) times a weight (n, in, out) of theirs; those of weight i end before ``offs[i]``."""
    known = isinstance(weight, FactoredWeight) and weight.weight.ndim == 3 and x.ndim == 2
    if offs is None or not known or any(value is not None for value in options.values()):
        return NotImplemented
    total = function(x, weight.weight, offs=offs)
    for product in weight.products:
        delta = grouped_product(product.dropped(x), product.left, product.right, offs)
        total = _plus(total, delta * product.scale)
    return total


def grouped_product(x: Tensor, left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """``x @ left[i] @ right[i]`` for rows in groups, of which those that are empty cost nothing.

    Args:
        x: (rows, in), sorted by group.
        left: (n, in, r).
        right: (n, r, out).
        offs: (n,), where each group ends.

    Returns:
        (rows, out) in the dtype of ``x``.
    """
    fake = isinstance(offs, loaded("torch._subclasses.fake_tensor", "FakeTensor"))
    ends = [len(x)] if fake else offs.tolist()  # in a forecast, that of one group: as large as those of all
    groups = [(i, slice(start, end)) for i, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]  # noqa: B905
    if composes():
        parts = [x[rows] @ left[i].to(x.dtype) @ right[i].to(x.dtype) for i, rows in groups]
        return F.pad(torch.cat(parts), (0, 0, 0, len(x) - ends[-1])) if parts else x.new_zeros(len(x), right.shape[2])
    with without_autocast(x.device.type):
        return _Grouped.apply(x, left, right, groups)  # type: ignore[no-any-return, no-untyped-call]


class _Grouped(torch.autograd.Function):
    """``grouped_product``, whose gradients are written into one tensor each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, groups: list[tuple[int, slice]]) -> Tensor:
        hidden = x.new_zeros(len(x), left.shape[2])
        output = x.new_zeros(len(x), right.shape[2])
        for i, rows in groups:
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
