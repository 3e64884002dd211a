"""Adapters whose delta is a whole weight, computed anew from few parameters at each call.

    y = W x + Δ(p) x        Δ: shaped like the weight, p: what is trained

Composed from ordinary operations, autograd would keep Δ and all that it is made of, one or more weights a
layer. Here backward computes Δ again, from the parameters alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.contract.adapter import Adapter, IsLowRank, LowRankDelta, Rescales
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.kernels.numerics import composes, compute_dtype, without_autocast

Compute = Callable[..., Tensor]
"""Parameters, in their order -> Δ, shaped like the canonical weight."""


class WeightDelta(Adapter):
    """An adapter that adds ``delta(*parameters)`` to the weight, a differentiable function of its parameters.

    Subclasses give ``delta`` and, where they drop something in training, ``delta_in_training``.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its parameters, in the order of ``parameter_shapes``."""
        return tuple(self.held[name] for name in self._names)

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """Computes what to add to the canonical weight, in that shape and the dtype of the parameters."""
        raise NotImplementedError

    def delta_in_training(self, base: BaseLayer) -> Compute | None:
        """Returns what computes it in this call of a training; None where nothing is added in it."""
        return lambda *parameters: self.delta(base, *parameters)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The layer's map with the delta as its weight, shaped like the output; see ``Adapter``."""
        compute = self.delta_in_training(base) if self.training else lambda *given: self.delta(base, *given)
        if compute is None:
            return torch.zeros_like(base_output)
        return apply_delta(x, base, compute, self.tensors)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """The delta, in the dtype of the parameters; see ``Adapter``."""
        return self.delta(base, *self.tensors)


class ScaledDelta(WeightDelta, Rescales):
    """A delta times a scaling, alpha / r; in training the whole of it may be dropped, or rows of it.

    Attributes:
        rank: what the config asks for on the layer.
        alpha: likewise.
        module_dropout: probability that nothing is added in a call.
        rank_dropout: probability on each row of the delta.
        rescales_rows: whether the rows that are left are made larger by the share of those that are not.
    """

    from_config: ClassVar[Mapping[str, str]] = {
        "scaling": "scaling_at",
        "rank": "rank_at",
        "alpha": "alpha_at",
        "module_dropout": "module_dropout",
        "rank_dropout": "rank_dropout",
    }
    peft: ClassVar[PeftNames] = PeftNames(
        attributes={name: name for name in ("r", "alpha", "rank_dropout", "module_dropout")} | {"r": "rank"}
    )

    rank: int
    alpha: float
    module_dropout: float
    rank_dropout: float
    rescales_rows: bool = True

    def unscaled_delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """Computes the delta without its scaling, shaped like the canonical weight."""
        raise NotImplementedError

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """Scales the delta; see ``WeightDelta``."""
        return self.unscaled_delta(base, *parameters) * self.scaling

    def is_left_out(self) -> bool:
        """Whether a layer goes without it in a call of a training; a number is drawn for each, as in PEFT."""
        if not self.module_dropout and composes():
            return False
        return float(torch.rand(1)) <= self.module_dropout

    def delta_in_training(self, base: BaseLayer) -> Compute | None:
        """Drops it, or rows of it; see ``WeightDelta``."""
        if self.is_left_out():
            return None
        if not self.rank_dropout:
            return super().delta_in_training(base)
        shape = base.kind.weight_shape(base.module)
        kept = (torch.rand(shape[0]) > self.rank_dropout).to(base.device, self.tensors[0].dtype)
        if self.rescales_rows:
            kept = kept / kept.mean().clamp_min(1 / shape[0])
        rows = kept.view(-1, *[1] * (len(shape) - 1))
        return lambda *parameters: self.delta(base, *parameters) * rows


class ComputedFactors(Adapter, IsLowRank):
    """An adapter that adds ``B A dropout(x)``, whose two factors are computed from what is trained."""

    dropout: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank of the factors."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (r, in), and B, (out, r), differentiable functions of the parameters."""

    @property
    def delta_rank(self) -> int | None:
        """The rank of the factors."""
        return self.rank

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``B A dropout(x)``; see ``Adapter``."""
        first, second = self.factors()
        dtype = compute_dtype(x, first)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        return F.linear(F.linear(dropped, first.to(dtype)), second.to(dtype))

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``B A``; see ``Adapter``."""
        first, second = self.factors()
        return second @ first

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """Both factors; see ``IsLowRank``."""
        return LowRankDelta(*self.factors(), 1.0)


def apply_delta(
    x: Tensor,
    base: BaseLayer,
    compute: Compute,
    parameters: tuple[Tensor, ...],
    *,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The map of a layer with a computed weight; backward keeps its arguments and nothing else.

    Args:
        x: the layer's input, (…, in) or ids.
        base: the layer.
        compute: parameters -> canonical weight.
        parameters: tensors that are trained.
        dtype: to compute in; that of the parameters, or autocast's, if None.
        bias: frozen, (out,), of a linear layer; None for none.
    """
    dtype = dtype or compute_dtype(x, parameters[0])
    if composes():
        return _map(base, _cast(x, dtype), compute(*parameters).to(dtype), bias)
    return _ApplyDelta.apply(x, base, compute, dtype, bias, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def in_one_product(
    x: Tensor, base: BaseLayer, changed: Callable[..., Tensor], parameters: tuple[Tensor, ...]
) -> Tensor | None:
    """``W' x + b`` of a linear layer; None where its weight is not stored as it is, so that no W is at hand.

    Args:
        x: the layer's input, (…, in).
        base: the layer.
        changed: the canonical weight and the parameters -> W'.
        parameters: tensors that are trained.
    """
    if base.backend.name != "dense":
        return None
    weight = base.weight()
    dtype = compute_dtype(x, weight)
    return apply_delta(x, base, lambda *given: changed(weight, *given), parameters, dtype=dtype, bias=base.bias)


def with_entries(weight: Tensor, places: Tensor, entries: Tensor) -> Tensor:
    """A weight with entries added at some places; not in place.

    Args:
        weight: (out, in).
        places: whole numbers, rows and columns, (2, n), or places in the flat weight, (n,).
        entries: (n,).
    """
    places = places.to(weight.device).long()
    if places.dim() == 2:  # in one dimension torch adds many times faster
        places = places[0] * weight.shape[1] + places[1]
    return weight.reshape(-1).index_add(0, places, entries.to(weight.dtype)).view_as(weight)


def _map(base: BaseLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return base.kind.apply(base.module, x, weight) if bias is None else F.linear(x, weight, bias.to(weight.dtype))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


class _ApplyDelta(torch.autograd.Function):
    """The map with Δ, which backward computes again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: BaseLayer,
        compute: Compute,
        dtype: torch.dtype,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.base, ctx.compute, ctx.dtype = base, compute, dtype
        ctx.save_for_backward(x, *parameters)
        with without_autocast(x.device.type):
            return _map(base, _cast(x, dtype), compute(*parameters).to(dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        of_output, base = gradients[0], ctx.base
        learning = [parameter.requires_grad for parameter in saved]
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(saved, learning, strict=True)]
        with without_autocast(x.device.type):
            with torch.enable_grad():
                delta = ctx.compute(*leaves)
            of_x, of_delta = _gradients(base, _cast(x, ctx.dtype), delta.detach().to(ctx.dtype), of_output, ctx)
            found: list[Tensor | None] = [None] * len(leaves)
            if of_delta is not None:
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                given = iter(torch.autograd.grad(delta, wanted, of_delta.to(delta.dtype), allow_unused=True))
                found = [next(given) if leaf.requires_grad else None for leaf in leaves]
        return (None if of_x is None else of_x.to(x.dtype), None, None, None, None, *found)


def _gradients(
    base: BaseLayer, x: Tensor, delta: Tensor, of_output: Tensor, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the delta, where they are needed."""
    for_x, for_delta = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
    if base.kind.is_linear:
        of_x = of_output @ delta if for_x else None
        of_delta = of_output.reshape(-1, delta.shape[0]).T @ x.reshape(-1, delta.shape[1]) if for_delta else None
        return of_x, of_delta
    x, delta = x.detach(), delta.requires_grad_(for_delta)
    if for_x:
        x.requires_grad_()
    with torch.enable_grad():
        output = base.kind.apply(base.module, x, delta)
    wanted = [tensor for tensor, needed in ((x, for_x), (delta, for_delta)) if needed]
    found = iter(torch.autograd.grad(output, wanted, of_output))
    return next(found) if for_x else None, next(found) if for_delta else None


def keeping_inputs(
    function: Callable[..., Tensor], x: Tensor, *parameters: Tensor, keeps_little: bool = False
) -> Tensor:
    """``function(x, *parameters)``, of which backward keeps the arguments alone and computes the rest again.

    Args:
        function: differentiable, and without random numbers.
        x: the layer's input.
        parameters: tensors that are trained.
        keeps_little: autograd would keep little beside the arguments, but for a copy of ``x`` in another dtype: nothing
            is computed again where there is none.
    """
    if composes() or (keeps_little and compute_dtype(x, parameters[0]) == x.dtype):
        return function(x, *parameters)
    return _KeepingInputs.apply(function, x, *parameters)  # type: ignore[no-any-return, no-untyped-call]


class _KeepingInputs(torch.autograd.Function):
    """A function whose intermediate results are computed again."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        device = inputs[0].device.type
        ctx.function = function
        ctx.save_for_backward(*inputs)
        with without_autocast(device):
            return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [tensor.detach() for tensor in ctx.saved_tensors]
        leaves = [tensor.requires_grad_(one) for tensor, one in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), without_autocast(inputs[0].device.type):
            output = ctx.function(*leaves)
            wanted = [leaf for leaf, one in zip(leaves, needed, strict=True) if one]
            found = iter(torch.autograd.grad(output, wanted, gradients[0], allow_unused=True))
        return None, *(next(found) if one else None for one in needed)
