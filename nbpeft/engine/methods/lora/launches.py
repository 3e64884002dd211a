"""The low-rank product on a linear layer on an accelerator, in few kernels.

    total = W x + b                       one kernel, in the dtype of the layer
    hidden = A dropout(x)                 a cast, dropout and its mask in one, a product
    total += scaling * (B hidden)         a product in the adapter's dtype, and a sum that scales and rounds once

Starting a kernel takes a processor longer than an accelerator computes a thin product, so nothing is computed in
pieces and no factor takes a kernel of its own. Between a layer in half precision and an adapter in float32 the
adapter's products are in float32, as in PEFT: its change is added before the one rounding. In one dtype the last two
steps are one product. Stored for backward: x or its origin, the mask (a byte per element) and A x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.numerics import autocast_dtype, fits, without_autocast
from nbpeft.engine.methods.lora.autograd import (
    Factors,
    as_rows,
    differentiable_backward,
    input_again,
    kept_input,
    linear_into,
)
from nbpeft.engine.methods.lora.dropout import KeepMask

_dropout_again = torch.ops.aten.native_dropout_backward.default
"""``(values, mask, scale)``: their product, in one kernel."""


def in_few_launches(
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
        frozen: weight and bias of a frozen layer, in the dtype of ``x`` unless autocast is on.
        probability: probability of dropout of the input, below 1.
        dtype: in which the product is computed.

    Returns:
        (..., out) in the dtype of ``onto`` or of the layer's output, else in ``dtype``.
    """
    if torch.is_grad_enabled():
        output: Tensor = _FewLaunches.apply(x, *factors[:2], onto, frozen, factors[2], probability, dtype)
        return output
    return _total(x, factors, onto, frozen, probability, dtype)[0]


def _total(
    x: Tensor,
    factors: Factors,
    onto: Tensor | None,
    frozen: tuple[Tensor, Tensor | None] | None,
    probability: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], KeepMask | None]:
    """The output, A x, A and B as they were multiplied by, and the mask."""
    lora_A, lora_B, scaling = factors
    casts = autocast_dtype(x.device.type) is not None
    with without_autocast(x.device.type):
        wide, keep, down, up = x.to(dtype), None, lora_A.to(dtype), lora_B.to(dtype)
        x = wide if casts else x
        if probability:
            wide, mask = torch.native_dropout(wide, probability, True)
            keep = KeepMask(x.shape, probability, mask)
        hidden = as_rows(wide) @ down.T
        shape = (*x.shape[:-1], lora_B.shape[0])
        if onto is None and frozen is None:
            return _scaled(hidden, up.T, scaling).view(shape), hidden, (down, up), keep
        # An output must not be a view: models change outputs in place.
        total = torch.empty(shape, dtype=x.dtype if onto is None else onto.dtype, device=x.device)
        rows = as_rows(total)
        if frozen is not None:
            weight, bias = frozen
            onto = linear_into(as_rows(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), out=rows)
        assert onto is not None
        _add_scaled(as_rows(onto), hidden, up.T, scaling, out=rows)
    return total, hidden, (down, up), keep


def _scaled(left: Tensor, right: Tensor, scaling: float | Tensor) -> Tensor:
    """``scaling * left @ right``, in one kernel unless the scaling is a tensor."""
    if isinstance(scaling, Tensor) or not fits(scaling, left.dtype):
        return (left @ right) * scaling
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scaling)


def _add_scaled(onto: Tensor, left: Tensor, right: Tensor, scaling: float | Tensor, out: Tensor) -> None:
    """``onto + scaling * left @ right``, computed in the wider dtype of both and rounded once, to that of ``out``."""
    if isinstance(scaling, Tensor) or not fits(scaling, onto.dtype):
        torch.add(onto, (left @ right) * scaling, out=out)
    elif onto.dtype == left.dtype:
        torch.addmm(onto, left, right, alpha=scaling, out=out)
    else:
        torch.add(onto, left @ right, alpha=scaling, out=out)


class _FewLaunches(torch.autograd.Function):
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
        total, hidden, ctx.used, ctx.keep = _total(x, (lora_A, lora_B, scaling), onto, frozen, probability, dtype)
        ctx.scaling, ctx.dtype = scaling, dtype
        weight = None if frozen is None else frozen[0]
        ctx.save_for_backward(lora_A, lora_B, hidden if ctx.needs_input_grad[2] else None, weight, *kept_input(ctx, x))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Only with ``create_graph=True``, for derivatives of higher order.
        if torch.is_grad_enabled():
            return differentiable_backward(ctx, gradients[0])
        lora_A, lora_B, hidden, weight, *inputs = ctx.saved_tensors
        x, keep, dtype, (down, up) = input_again(ctx, inputs), ctx.keep, ctx.dtype, ctx.used
        need_x, need_A, need_B, need_onto = ctx.needs_input_grad[:4]
        grad_x = grad_A = grad_B = None
        with without_autocast(x.device.type):
            upstream = as_rows(gradients[0])
            rows = upstream.to(dtype)
            if need_B:
                grad_B = _scaled(rows.T, hidden, ctx.scaling).to(lora_B.dtype)
            if need_A or need_x:
                thin = _scaled(rows, up, ctx.scaling)
            if need_A:
                wide = x.to(dtype)
                dropped = wide if keep is None else _dropout_again(wide, keep.stored, keep.scale)
                grad_A = (thin.T @ as_rows(dropped)).to(lora_A.dtype)
            if need_x:
                grad_x = _input_gradient(upstream, weight, thin, down, keep).view(x.shape).to(x.dtype)
        return grad_x, grad_A, grad_B, gradients[0] if need_onto else None, None, None, None, None


def _input_gradient(
    upstream: Tensor, weight: Tensor | None, thin: Tensor, lora_A: Tensor, keep: KeepMask | None
) -> Tensor:
    """The gradient of the input, (tokens, in): the adapter's, plus that of the frozen weight if there is one."""
    weight = None if weight is None else weight.to(upstream.dtype)
    if weight is not None and keep is None and weight.dtype == thin.dtype:
        return (upstream @ weight).addmm_(thin, lora_A)
    wide = thin @ lora_A
    if keep is not None:
        wide = _dropout_again(wide, as_rows(keep.stored), keep.scale)
    if weight is None:
        return wide
    return wide.addmm_(upstream, weight) if weight.dtype == wide.dtype else (upstream @ weight).add_(wide)
