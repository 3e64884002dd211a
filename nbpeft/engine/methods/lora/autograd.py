"""The low-rank product on a linear layer on a CPU, which stores only its input for backward and moves few bytes.

    y = scaling * B(A(dropout(x)))        A: (r, in), B: (out, r)

For ordinary operations autograd would store a copy of ``x`` in the adapter's dtype, a copy after dropout, the dropout
mask and the hidden product: several times the size of ``x`` in every layer. ``x`` itself is in memory anyway (q, k and
v share it), so backward repeats cast and dropout, and only the thin product A x is stored in addition. If ``x`` itself
can be recomputed (``recomputed``), the tensors it is computed from are stored instead.

Between a bfloat16 layer and factors in float32, the products that have the width of the layer are in bfloat16, from
factors in two pieces each (``_pieces``): they need no buffer in float32, no cast and no sum of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.numerics import onednn_multiplies, without_autocast
from nbpeft.engine.kernels.recomputed import origin_of
from nbpeft.engine.methods.lora.dropout import KeepMask

_LEAST_WIDE, _TOKENS_TO_RANK = 1 << 17, 4
"""Making pieces of the factors is worth it for inputs of at least so many elements, and so many tokens to a rank."""

Factors = tuple[Tensor, Tensor, float | Tensor]
"""A (r, in), B (out, r) and the scaling: a number, or a 0-d tensor if hot-swapping may change it."""


def lean_product(
    x: Tensor,
    factors: Factors,
    onto: Tensor | None,
    frozen: tuple[Tensor, Tensor | None] | None,
    probability: float,
    dtype: torch.dtype,
) -> Tensor:
    """``scaling * B(A(dropout(x)))``, added to ``onto`` or to the output of a frozen linear layer.

    Args:
        x: (..., in), any floating dtype.
        factors: A, B and their scaling.
        onto: (..., out), a tensor to add the product to.
        frozen: weight and bias of a frozen layer, in the dtype of ``x``.
        probability: probability of dropout of the input, below 1.
        dtype: in which the product is computed.
    """
    lora_A, lora_B, scaling = factors
    return _LowRank.apply(x, lora_A, lora_B, onto, frozen, scaling, probability, dtype)


class _LowRank(torch.autograd.Function):
    """See ``lean_product``.

    Saves x or its origin, A, B and the thin product A x. ``frozen`` is the layer's weight and bias, in the dtype of
    ``x``. Forward and backward use one wide buffer each, and the adapter's gradient is accumulated into the frozen
    layer's: on a CPU allocating memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        onto: Tensor | None,
        frozen: tuple[Tensor, Tensor | None] | None,
        scaling: float | Tensor,
        probability: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.scaling, ctx.probability, ctx.dtype = scaling, probability, dtype
        ctx.keep, mask = KeepMask.drawn(x, probability) if probability else (None, None)
        ctx.pieces = takes_pieces(x, lora_A, dtype)
        out_features = lora_B.shape[0]
        shape = (*x.shape[:-1], out_features)
        wide = x.dtype if ctx.pieces else dtype
        # An output that is returned without a cast must not be a view: models change outputs in place.
        needs_result = frozen is not None or (onto is not None and onto.dtype == wide)
        total = torch.empty(shape, dtype=wide, device=x.device) if needs_result else None
        with without_autocast(x.device.type):
            buffer = _buffer(x, max(x.shape[-1], out_features), dtype, probability, total) if wide == dtype else None
            flat = _dropped_input(x, mask, dtype, buffer)
            hidden = (flat @ lora_A.to(dtype).T) * _factor(ctx)
            inputs = kept_input(ctx, x)
            weight = None if frozen is None else frozen[0]
            ctx.save_for_backward(lora_A, lora_B, hidden if ctx.needs_input_grad[2] else None, weight, *inputs)
            pieces = ctx.pieces and total is not None
            left, right = _pieces(hidden, lora_B, wide, 1) if pieces else (hidden, lora_B.to(dtype))
            if frozen is not None and total is not None:
                linear_into(as_rows(x), *frozen, out=as_rows(total)).addmm_(left, right.T)
                return total
            if onto is None:
                return (left @ right.T).view(shape)
            if pieces and total is not None:
                torch.addmm(as_rows(onto), left, right.T, out=as_rows(total))
                return total
            room = _part(buffer, hidden.shape[0], out_features) if total is None else as_rows(total)
            product = torch.mm(left, right.T, out=room)
            return (product.view(shape) if total is None else total).add_(onto).to(onto.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Only with ``create_graph=True``, for derivatives of higher order.
        if torch.is_grad_enabled():
            return differentiable_backward(ctx, gradients[0])
        lora_A, lora_B, hidden, weight, *inputs = ctx.saved_tensors
        x = input_again(ctx, inputs)
        dtype: torch.dtype = ctx.dtype
        need_x, need_A, need_B, need_onto = ctx.needs_input_grad[:4]
        with without_autocast(x.device.type):
            upstream = rows = as_rows(gradients[0])
            width = max(x.shape[-1], 0 if rows.dtype == dtype else rows.shape[-1])
            buffer = _buffer(x, width, dtype, ctx.probability)
            if rows.dtype != dtype:
                room = _part(buffer, *rows.shape)
                rows = rows.to(dtype) if room is None else room.copy_(rows)
            grad_x = grad_A = grad_B = None
            if need_B:
                # Transposed afterwards: the product ``rows.T @ hidden`` is tall and thin, and takes twice as long.
                grad_B = (hidden.T @ rows).T.to(lora_B.dtype)
            if need_A or need_x:
                hidden_gradient = (rows @ lora_B.to(dtype)) * _factor(ctx)
            mask = None if ctx.keep is None else ctx.keep.again()
            if need_A:
                grad_A = (hidden_gradient.T @ _dropped_input(x, mask, dtype, buffer)).to(lora_A.dtype)
            if need_x and ctx.pieces:
                thin = _pieces(hidden_gradient, lora_A, x.dtype, 0)
                grad_x = _input_gradient(upstream, weight, *thin, mask, None).view(x.shape)
            elif need_x:
                inside = _part(buffer, rows.shape[0], x.shape[-1])
                grad_x = _input_gradient(upstream, weight, hidden_gradient, lora_A.to(dtype), mask, inside)
                grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, grad_A, grad_B, gradients[0] if need_onto else None, None, None, None, None


def kept_input(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The tensors to save for ``input_again``: ``x``, or those from which it can be computed again."""
    origin = origin_of(x)
    ctx.recomputation = None if origin is None else origin.recomputation
    if origin is None:
        return (x,)
    origin.recomputation.add_reader()
    return origin.inputs


def input_again(ctx: Any, inputs: Sequence[Tensor]) -> Tensor:
    """The input of which ``kept_input`` saved ``inputs``."""
    output: Tensor = inputs[0] if ctx.recomputation is None else ctx.recomputation.output(inputs)
    return output


def takes_pieces(x: Tensor, lora_A: Tensor, dtype: torch.dtype) -> bool:
    """Whether wide products are computed in bfloat16, from pieces of the factors; see ``_pieces``."""
    least = max(_LEAST_WIDE, _TOKENS_TO_RANK * lora_A.numel())
    if x.dtype != torch.bfloat16 or dtype != torch.float32 or x.numel() < least:
        return False
    return onednn_multiplies(torch.bfloat16)


def _pieces(left: Tensor, right: Tensor, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor]:
    """Two factors in a narrower dtype of the same exponents, whose product is that of the given ones.

    Each is the sum of its rounded values and the rounded rest. All products of these but that of both rests are added
    in float32 within one matrix product, so its error is 2⁻¹⁶ of a summand, and the result is rounded once.

    Args:
        left: (tokens, r), float32.
        right: (r, width) or (width, r), float32.
        dtype: bfloat16.
        dim: the dimension of ``right`` that is the rank.

    Returns:
        Both with three times the rank.
    """
    (high, low), (other, rest) = ((part := one.to(dtype), (one - part).to(dtype)) for one in (left, right))
    return torch.cat([high, high, low], 1), torch.cat([other, rest, other], dim)


def linear_into(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A linear layer's output, written to ``out``."""
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def _input_gradient(
    rows: Tensor,
    weight: Tensor | None,
    hidden_gradient: Tensor,
    lora_A: Tensor,
    mask: Tensor | None,
    buffer: Tensor | None,
) -> Tensor:
    """The gradient of the input, (tokens, in): the adapter's, plus that of the frozen weight if there is one."""
    if weight is not None and mask is None:
        return (rows @ weight).addmm_(hidden_gradient, lora_A)
    wide = torch.mm(hidden_gradient, lora_A, out=buffer)
    if mask is not None:
        mask = mask.reshape(wide.shape)
        # A CPU is slow at products of integers and half precision.
        wide.mul_(mask if wide.dtype.itemsize >= 4 else mask.to(wide.dtype))
    return wide if weight is None else wide.addmm_(rows, weight)


def differentiable_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for higher derivatives."""
    lora_A, lora_B, _, weight, *inputs = ctx.saved_tensors
    x = inputs[0] if ctx.recomputation is None else ctx.recomputation.differentiable_output(inputs)
    with without_autocast(x.device.type):
        mask = None if ctx.keep is None else ctx.keep.again()
        cast = x.to(ctx.dtype)
        flat = as_rows(cast if mask is None else cast * mask)
        down, up, factor = lora_A.to(ctx.dtype), lora_B.to(ctx.dtype), _factor(ctx)
        rows = as_rows(gradient).to(ctx.dtype)
        hidden_gradient = (rows @ up) * factor
        grad_x = (hidden_gradient @ down).view(x.shape)
        grad_x = grad_x if mask is None else grad_x * mask
        grad_x = grad_x if weight is None else grad_x + gradient @ weight.to(gradient.dtype)
        grad_A, grad_B = hidden_gradient.T @ flat, rows.T @ ((flat @ down.T) * factor)
    onto = gradient if ctx.needs_input_grad[3] else None
    return grad_x.to(x.dtype), grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), onto, None, None, None, None


def _buffer(
    x: Tensor, width: int, dtype: torch.dtype, probability: float, result: Tensor | None = None
) -> Tensor | None:
    """A buffer for (tokens, width) values in the compute dtype; None if neither a cast nor dropout needs a copy.

    A result tensor that is filled later serves as the buffer if it is at least as large as ``x``.
    """
    if x.dtype == dtype and not probability:
        return None
    if result is not None and result.numel() >= x.numel():
        return result.view(-1)
    count = math.prod(x.shape[:-1]) * width if result is None else x.numel()
    return torch.empty(count, dtype=dtype, device=x.device)


def _part(buffer: Tensor | None, rows: int, columns: int) -> Tensor | None:
    return None if buffer is None else buffer[: rows * columns].view(rows, columns)


def _factor(ctx: Any) -> float | Tensor:
    """The scaling, times the scale of dropout."""
    scaling: float | Tensor = ctx.scaling
    return scaling if ctx.keep is None else scaling * ctx.keep.scale


def as_rows(x: Tensor) -> Tensor:
    """(…, features) as (tokens, features), even if there are no features or no tokens."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _dropped_input(x: Tensor, mask: Tensor | None, dtype: torch.dtype, buffer: Tensor | None) -> Tensor:
    """``x`` as (tokens, in) in the compute dtype, with dropped elements set to zero."""
    flat = as_rows(x)
    part = _part(buffer, *flat.shape)
    if mask is not None and x.dtype.itemsize >= 4:
        return torch.mul(flat, mask.reshape(flat.shape), out=part)
    dropped = flat if mask is None else mask.reshape(flat.shape).to(x.dtype).mul_(flat)
    return dropped.to(dtype) if part is None else part.copy_(dropped)
