"""The low-rank product on a linear layer, which saves only its input for backward.

    y = scaling * B(A(dropout(x)))        A: (r, in), B: (out, r)

For ordinary operations autograd would save a copy of ``x`` in the adapter's dtype, a copy after dropout, the dropout
mask and the hidden product: several times the size of ``x`` in every layer. ``x`` itself is in memory anyway (q, k and
v share it), so backward repeats cast and dropout, and only the thin product A x is saved in addition. If ``x`` itself
can be recomputed (``recomputed``), the tensors it is computed from are saved instead.

On the CPU the mask is drawn as ``F.dropout`` draws it, so that the same seed drops the same elements, and is saved as
bits. On other devices it is drawn from a seed, which comes from the CPU generator and is saved instead of the mask.
Activation checkpointing restores that generator, so recomputation draws the same mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.kernels.numerics import add_delta, composes, compute_dtype, without_autocast
from nbpeft.engine.kernels.recomputed import origin_of

_LANES = 1 << 16
"""Number of values of one 16-bit lane of a random word."""
_GATHER, _SPREAD, _PICK = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)
"""Constants, as int64, for packing a mask of bytes into bits and back. The first is a factor that gathers the lowest
bits of eight bytes in the highest byte; the second a factor that copies one byte to eight; the third selects one bit of
each of them."""
_EXACT = (torch.float32, torch.float64)
"""Dtypes in which adding a product in place gives the same bits as adding it afterwards."""

Factors = tuple[Tensor, Tensor, float | Tensor]
"""A (r, in), B (out, r) and the scaling: a number, or a 0-d tensor if hot-swapping may change it."""


@dataclass(frozen=True)
class Dropout:
    """Dropout of an adapter's input: its probability, and whether the adapter is in training mode."""

    probability: float
    training: bool

    @property
    def is_active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.probability > 0.0

    @property
    def active_probability(self) -> float:
        """The probability in this call: 0 outside of training."""
        return self.probability if self.training else 0.0


def draw_seed() -> int:
    """A seed from the CPU generator."""
    return int(torch.randint(1 << 62, (), dtype=torch.long))


@dataclass(frozen=True)
class KeepMask:
    """A dropout mask of zeros (dropped) and ones, stored compactly.

    Attributes:
        shape: shape of the input.
        probability: probability of a zero.
        device: device of the input.
        source: the bits of the mask, uint8; or the seed from which it is drawn.
        strides: strides of the mask, which is drawn in the memory order of a dense input.
    """

    shape: torch.Size
    probability: float
    device: torch.device
    source: Tensor | int
    strides: tuple[int, ...] = ()

    @classmethod
    def drawn(cls, x: Tensor, probability: float, dtype: torch.dtype) -> tuple[Self, Tensor]:
        """Draws a new mask for an input, and returns it with the mask as a tensor; see ``again``.

        Args:
            x: the input.
            probability: probability of a zero.
            dtype: dtype of the mask.
        """
        if _seeded(x.device):
            keep = cls(x.shape, probability, x.device, draw_seed())
            return keep, keep.again(dtype)
        count = x.numel()
        places = torch.empty(-(-count // 8) * 8, dtype=torch.uint8)
        places[:count].bernoulli_(1 - probability)
        places[count:] = 0
        bits = places.view(torch.int64).mul(_GATHER).bitwise_right_shift_(56).to(torch.uint8)
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        mask = places[:count].to(dtype).as_strided(x.shape, strides)
        return cls(x.shape, probability, x.device, bits, strides), mask

    def again(self, dtype: torch.dtype) -> Tensor:
        """The mask as a tensor, without the ``scale``.

        If it is drawn from a seed, four elements share one 64-bit draw, which makes drawing it twice cheaper than one
        ``F.dropout``; the probability is then exact to 1 / 65536.
        """
        count = self.shape.numel()
        if isinstance(self.source, Tensor):
            places = self.source.to(torch.int64).mul_(_SPREAD).bitwise_and_(_PICK).view(torch.uint8)
            # Not ``ne(0)``: integers are cast ten times as fast as booleans.
            return places.clamp_(max=1)[:count].to(dtype).as_strided(self.shape, self.strides)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.source)
        if self.device.type == "mps":  # cannot draw over the whole range of int64
            lanes = torch.empty(count, dtype=torch.int32, device=self.device)
            lanes.random_(-(_LANES // 2), _LANES // 2, generator=generator)
        else:
            words = torch.empty((count + 3) // 4, dtype=torch.int64, device=self.device)
            words.random_(-(1 << 63), None, generator=generator)
            lanes = words.view(torch.int16)[:count]
        return (lanes >= self._dropped_lanes - _LANES // 2).to(dtype).view(self.shape)

    @property
    def scale(self) -> float:
        """1 / (share of elements kept), for the exact probability of the mask."""
        kept = 1 - self.probability if isinstance(self.source, Tensor) else 1.0 - self._dropped_lanes / _LANES
        return 1.0 / kept if kept > 0 else 0.0

    @property
    def _dropped_lanes(self) -> int:
        return min(round(self.probability * _LANES), _LANES - 1)


def _seeded(device: torch.device) -> bool:
    """Whether masks are drawn from a seed, which is fast, instead of as ``F.dropout`` draws them."""
    return device.type != "cpu"


class _SeededDropout(torch.autograd.Function):
    """Dropout that saves its mask as bits, or as a seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.keep, mask = KeepMask.drawn(x, probability, x.dtype)
        return x * mask.mul_(ctx.keep.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.keep.again(gradients[0].dtype).mul_(ctx.keep.scale), None


def seeded_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """Dropout of ``x`` (any shape) that saves less than a mask for backward; see ``KeepMask``."""
    if not dropout.is_active:
        return x
    if dropout.probability >= 1.0 or composes():
        return F.dropout(x, dropout.probability)
    return _SeededDropout.apply(x, dropout.probability)  # type: ignore[no-untyped-call]


class _LowRank(torch.autograd.Function):
    """``scaling * B(A(dropout(x)))``, added to ``onto`` or to the output of a frozen linear layer.

    Saves x or its origin, A, B and the thin product A x. ``frozen`` is the layer's weight and bias, in the compute
    dtype. Forward and backward use one wide buffer each, and the adapter's gradient is accumulated into the frozen
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
        ctx.keep, mask = KeepMask.drawn(x, probability, x.dtype) if probability else (None, None)
        out_features = lora_B.shape[0]
        shape = (*x.shape[:-1], out_features)
        # An output that is returned without a cast must not be a view: models change outputs in place.
        needs_result = frozen is not None or (onto is not None and onto.dtype == dtype)
        total = torch.empty(shape, dtype=dtype, device=x.device) if needs_result else None
        with without_autocast(x.device.type):
            buffer = _buffer(x, max(x.shape[-1], out_features), dtype, probability, None if frozen else total)
            flat = _dropped_input(x, mask, buffer)
            hidden = (flat @ lora_A.to(dtype).T) * _factor(ctx)
            origin = origin_of(x)
            ctx.recomputation = None if origin is None else origin.recomputation
            if origin is not None:
                origin.recomputation.add_reader()
            inputs = (x,) if origin is None else origin.inputs
            weight = None if frozen is None else frozen[0]
            ctx.save_for_backward(lora_A, lora_B, hidden if ctx.needs_input_grad[2] else None, weight, *inputs)
            if frozen is not None and total is not None:
                _linear(_as_rows(x), *frozen, out=_as_rows(total)).addmm_(hidden, lora_B.T)
                return total
            if onto is None:
                return (hidden @ lora_B.to(dtype).T).view(shape)
            room = (
                _part(buffer, hidden.shape[0], out_features)
                if total is None
                else total.view(hidden.shape[0], out_features)
            )
            product = torch.mm(hidden, lora_B.to(dtype).T, out=room)
            return (product.view(shape) if total is None else total).add_(onto).to(onto.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Only with ``create_graph=True``, for derivatives of higher order.
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, gradients[0])
        lora_A, lora_B, hidden, weight, *inputs = ctx.saved_tensors
        x = inputs[0] if ctx.recomputation is None else ctx.recomputation.output(inputs)
        dtype: torch.dtype = ctx.dtype
        need_x, need_A, need_B, need_onto = ctx.needs_input_grad[:4]
        with without_autocast(x.device.type):
            rows = _as_rows(gradients[0])
            buffer = _buffer(x, max(x.shape[-1], lora_B.shape[0]), dtype, ctx.probability)
            if rows.dtype != dtype:
                room = _part(buffer, *rows.shape)
                rows = rows.to(dtype) if room is None else room.copy_(rows)
            grad_x = grad_A = grad_B = None
            if need_B:
                # Transposed afterwards: the product ``rows.T @ hidden`` is tall and thin, and takes twice as long.
                grad_B = (hidden.T @ rows).T.to(lora_B.dtype)
            if need_A or need_x:
                hidden_gradient = (rows @ lora_B.to(dtype)) * _factor(ctx)
            mask = _mask(x, ctx)
            if need_A:
                grad_A = (hidden_gradient.T @ _dropped_input(x, mask, buffer)).to(lora_A.dtype)
            if need_x:
                inside = _part(buffer, rows.shape[0], x.shape[-1])
                grad_x = _input_gradient(rows, weight, hidden_gradient, lora_A.to(dtype), mask, inside)
                grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, grad_A, grad_B, gradients[0] if need_onto else None, None, None, None, None


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
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
    if mask is None:
        return wide
    mask = mask.reshape(wide.shape)
    if weight is not None:
        return (rows @ weight).addcmul_(wide, mask)
    # Zeros and ones commute with a cast that cannot overflow, and a product of two dtypes is slow on a CPU.
    return wide.to(mask.dtype).mul_(mask) if mask.dtype == torch.bfloat16 else wide.mul_(mask)


def _differentiable_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for higher derivatives."""
    lora_A, lora_B, _, weight, *inputs = ctx.saved_tensors
    x = inputs[0] if ctx.recomputation is None else ctx.recomputation.differentiable_output(inputs)
    with without_autocast(x.device.type):
        mask = _mask(x, ctx)
        cast = x.to(ctx.dtype)
        flat = _as_rows(cast if mask is None else cast * mask)
        down, up, factor = lora_A.to(ctx.dtype), lora_B.to(ctx.dtype), _factor(ctx)
        rows = _as_rows(gradient).to(ctx.dtype)
        hidden_gradient = (rows @ up) * factor
        grad_x = (hidden_gradient @ down).view(x.shape)
        grad_x = grad_x if mask is None else grad_x * mask
        grad_x = grad_x if weight is None else grad_x + gradient @ weight
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


def _mask(x: Tensor, ctx: Any) -> Tensor | None:
    return None if ctx.keep is None else ctx.keep.again(x.dtype)


def _factor(ctx: Any) -> float | Tensor:
    """The scaling, times the scale of dropout."""
    scaling: float | Tensor = ctx.scaling
    return scaling if ctx.keep is None else scaling * ctx.keep.scale


def _as_rows(x: Tensor) -> Tensor:
    """(…, features) as (tokens, features), even if there are no features or no tokens."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _dropped_input(x: Tensor, mask: Tensor | None, buffer: Tensor | None) -> Tensor:
    """``x`` as (tokens, in) in the compute dtype, with dropped elements set to zero."""
    flat = _as_rows(x)
    if buffer is None:
        return flat
    part = buffer[: flat.numel()].view(flat.shape)
    return part.copy_(flat) if mask is None else torch.mul(flat, mask.reshape(flat.shape), out=part)


def low_rank_linear(x: Tensor, factors: Factors, probability: float, onto: Tensor | None = None) -> Tensor:
    """``scaling * B(A(dropout(x)))`` for a linear layer, added to ``onto`` if that is given.

    Args:
        x: (..., in), any floating dtype.
        factors: A, B and their scaling, on the device of ``x``.
        probability: probability of dropout of the input, below 1.
        onto: (..., out), a tensor to add the product to.

    Returns:
        (..., out) in the dtype of ``onto``; without that, in the autocast dtype if autocast is on, else in the
        factors' dtype.
    """
    lora_A, lora_B, scaling = factors
    dtype = compute_dtype(x, lora_A)
    if onto is not None and (onto.device != x.device or torch.promote_types(onto.dtype, dtype) != dtype):
        return add_delta(onto, low_rank_linear(x, factors, probability).to(onto.device))
    return _LowRank.apply(x, lora_A, lora_B, onto, None, scaling, probability, dtype)  # type: ignore[no-untyped-call]


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: Dropout) -> Tensor | None:
    """``W x + b + scaling * B(A(dropout(x)))`` in one function, whose backward needs no buffer for each summand.

    Args:
        x: (..., in).
        weight: W of a frozen layer, (out, in).
        bias: the layer's bias, (out,), or None.
        factors: A, B and their scaling.
        dropout: dropout of the input.

    Returns:
        (..., out), with the same bits as the layer plus ``low_rank_linear``; None if that is not guaranteed: for
        dtypes other than float32 and float64, for several dtypes or devices, and for a layer that is trained.
    """
    lora_A, lora_B, scaling = factors
    tensors = [x, weight, lora_A, lora_B, *([] if bias is None else [bias])]
    alike = all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    probability = dropout.active_probability
    if not alike or trained or x.dtype not in _EXACT or probability >= 1.0:
        return None
    if composes() or torch.is_autocast_enabled(x.device.type):
        return None
    return _LowRank.apply(x, lora_A, lora_B, None, (weight, bias), scaling, probability, x.dtype)  # type: ignore[no-untyped-call]
