"""Adapters whose delta has the size of the weight and is computed from few parameters in each call.

    y = W x + Δ(p) x        Δ: shaped like the weight, p: the trained parameters

With ordinary operations autograd would store Δ and its intermediate results for backward, one or more
tensors of the weight's size for each layer. Here backward computes Δ again from the parameters.
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
"""Function of the parameters, in the order of ``parameter_shapes``, to Δ, shaped like the canonical weight."""


class WeightDelta(Adapter):
    """An adapter that adds ``delta(*parameters)`` to the weight, a differentiable function of its parameters.

    Subclasses implement ``delta`` and, if they have a form of dropout, ``delta_in_training``.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its parameters, in the order of ``parameter_shapes``."""
        return tuple(self.tensor(name) for name in self._names)

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """Computes the delta; must be differentiable, and give the same result when backward calls it again.

        Args:
            base: the layer.
            *parameters: in the order of ``parameter_shapes``.

        Returns:
            Shaped like the canonical weight, in the dtype of the parameters.
        """
        raise NotImplementedError

    def delta_in_training(self, base: BaseLayer) -> Compute | None:
        """The function that computes the delta in one call in training mode.

        Draw random numbers here and not in the function, which backward calls again.

        Args:
            base: the layer.

        Returns:
            The function; None if nothing is added in this call.
        """
        return lambda *parameters: self.delta(base, *parameters)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        compute = self.delta_in_training(base) if self.training else lambda *tensors: self.delta(base, *tensors)
        if compute is None:
            return torch.zeros_like(base_output)
        return apply_delta(x, base, compute, self.tensors)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        return self.delta(base, *self.tensors)


class ScaledDelta(WeightDelta, Rescales):
    """A delta times ``scaling`` (alpha / r), with dropout of the whole delta or of its rows in training.

    Attributes:
        rank: from the config, on this layer.
        alpha: from the config, on this layer.
        module_dropout: probability that nothing is added in a call.
        rank_dropout: probability that a row of the delta is zero in a call.
        rescales_rows: whether the remaining rows are divided by their share, which keeps the mean.
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
        """Computes the delta without ``scaling``, like ``WeightDelta.delta``."""
        raise NotImplementedError

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        return self.unscaled_delta(base, *parameters) * self.scaling

    def is_left_out(self) -> bool:
        """Draws whether ``module_dropout`` drops the delta in this call.

        A number is drawn even if the probability is 0, to advance the generator as PEFT does.
        """
        if not self.module_dropout and composes():
            return False
        return float(torch.rand(1)) <= self.module_dropout

    def delta_in_training(self, base: BaseLayer) -> Compute | None:
        """Applies ``module_dropout`` and ``rank_dropout``."""
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
    """An adapter that adds ``B A dropout(x)``, where A and B are computed from the trained parameters."""

    dropout: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank of the factors."""

    @property
    def delta_rank(self) -> int | None:
        return self.rank

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Computes A, (r, in), and B, (out, r); differentiable."""

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``B A dropout(x)``."""
        first, second = self.factors()
        dtype = compute_dtype(x, first)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        return F.linear(F.linear(dropped, first.to(dtype)), second.to(dtype))

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
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
    """Computes the output of a layer with a computed weight; autograd stores only ``x`` and the parameters.

    Args:
        x: the layer's input, (…, in) or ids.
        base: the layer.
        compute: function of the parameters to a canonical weight; backward calls it again.
        parameters: the trained tensors.
        dtype: to compute in; None for autocast's, or else that of the parameters.
        bias: bias of a linear layer, (out,), which is frozen; None for none.

    Returns:
        The output, (…, out), in ``dtype``.
    """
    dtype = dtype or compute_dtype(x, parameters[0])
    if composes():
        return _map(base, _cast(x, dtype), compute(*parameters).to(dtype), bias)
    return _ApplyDelta.apply(x, base, compute, dtype, bias, *parameters)


def in_one_product(
    x: Tensor, base: BaseLayer, changed: Callable[..., Tensor], parameters: tuple[Tensor, ...]
) -> Tensor | None:
    """Computes ``W' x + b`` of a linear layer in one product, with a changed weight W'.

    Args:
        x: the layer's input, (…, in).
        base: the layer.
        changed: function of the canonical weight and the parameters to W'.
        parameters: the trained tensors.

    Returns:
        The output, (…, out); None if the weight is quantized, so that it would have to be dequantized first.
    """
    if base.backend.name != "dense":
        return None
    weight = base.weight()
    dtype = compute_dtype(x, weight)
    return apply_delta(x, base, lambda *tensors: changed(weight, *tensors), parameters, dtype=dtype, bias=base.bias)


def with_entries(weight: Tensor, places: Tensor, entries: Tensor) -> Tensor:
    """Adds values at some positions of a weight; not in place.

    Args:
        weight: (out, in).
        places: integer indices: rows and columns, (2, n), or positions in the flattened weight, (n,).
        entries: the values to add, (n,).

    Returns:
        A new tensor, (out, in).
    """
    places = places.to(weight.device).long()
    if places.dim() == 2:  # torch adds many times faster with a one-dimensional index
        places = places[0] * weight.shape[1] + places[1]
    return weight.reshape(-1).index_add(0, places, entries.to(weight.dtype)).view_as(weight)


def _map(base: BaseLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return base.kind.apply(base.module, x, weight) if bias is None else F.linear(x, weight, bias.to(weight.dtype))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


class _ApplyDelta(torch.autograd.Function):
    """The layer's output with Δ as its weight; backward computes Δ again."""

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

    # Computed from detached tensors, so its own derivative would silently be wrong: asking for it is an error.
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        of_output, base = gradients[0], ctx.base
        # In two steps, so that autograd only stores the graph of Δ: first the gradient of Δ from the layer's map, then
        # the gradients of the parameters from that of Δ.
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
    """Gradients of the input and of the delta; None for one that is not needed."""
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
    """Computes ``function(x, *parameters)``; autograd stores only the arguments, and backward computes the rest again.

    Args:
        function: differentiable, and without random numbers.
        x: the layer's input.
        *parameters: the trained tensors.
        keeps_little: apart from a copy of ``x`` in another dtype, autograd would store little more than the arguments;
            so if no such copy is needed, nothing is computed again.

    Returns:
        What the function returns.
    """
    if composes() or (keeps_little and compute_dtype(x, parameters[0]) == x.dtype):
        return function(x, *parameters)
    return _KeepingInputs.apply(function, x, *parameters)


class _KeepingInputs(torch.autograd.Function):
    """A function whose intermediate results backward computes again."""

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
        leaves = [tensor.requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
        # As in forward: ``backward()`` may be called inside an autocast block.
        with torch.enable_grad(), without_autocast(inputs[0].device.type):
            output = ctx.function(*leaves)
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            found = iter(torch.autograd.grad(output, wanted, gradients[0], allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
