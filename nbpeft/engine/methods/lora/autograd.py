"""The low-rank product on a linear layer, which saves only its input for backward.

    y = scaling * B(A(dropout(x)))        A: (r, in), B: (out, r)

For ordinary operations autograd would save a copy of ``x`` in the adapter's dtype, a copy after dropout, the dropout
mask and the hidden product: several times the size of ``x`` in every layer. ``x`` itself is in memory anyway (q, k and
v share it), so backward repeats cast and dropout, and only the thin product A x is saved in addition. If ``x`` itself
can be recomputed (``recomputed``), the tensors it is computed from are saved instead.

On the CPU the mask is drawn as ``F.dropout`` draws it, so that the same seed drops the same elements, and is saved as
bits. On other devices it is drawn from a seed, which comes from the CPU generator and is saved instead of the mask.
Activation checkpointing restores that generator, so recomputation draws the same mask.

Between a bfloat16 layer and factors in float32, the products that have the width of the layer are in bfloat16, from
factors in two pieces each (``_pieces``): they need no buffer in float32, no cast and no sum of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.kernels.numerics import add_delta, composes, compute_dtype, onednn_multiplies, without_autocast
from nbpeft.engine.kernels.recomputed import origin_of

_LANES = 1 << 16
"""Number of values of one 16-bit lane of a random word."""
_ONES = 0x0101010101010101
"""The lowest bit of each byte of an int64."""
_WORD = 64
"""Bits of an int64, in each of which a mask of as many elements is saved."""
_LEAST_LEAN = 1 << 15
"""For smaller inputs a call of a custom function takes longer than what it saves."""
_LEAST_WIDE, _TOKENS_TO_RANK = 1 << 17, 4
"""Making pieces of the factors is worth it for inputs of at least so many elements, and so many tokens to a rank."""
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
        source: the bits of the mask, int64; or the seed from which it is drawn.
        strides: strides of the mask, which is drawn in the memory order of a dense input.
    """

    shape: torch.Size
    probability: float
    device: torch.device
    source: Tensor | int
    strides: tuple[int, ...] = ()

    @classmethod
    def drawn(cls, x: Tensor, probability: float) -> tuple[Self, Tensor]:
        """Draws a new mask for an input, and returns it with the mask as a tensor; see ``again``.

        Args:
            x: the input.
            probability: probability of a zero.
        """
        if _seeded(x.device):
            keep = cls(x.shape, probability, x.device, draw_seed())
            return keep, keep.again()
        count = x.numel()
        places = torch.empty(-(-count // _WORD) * _WORD, dtype=torch.uint8)
        places[:count].bernoulli_(1 - probability)
        places[count:] = 0
        # Eight bytes are a word; bit k of each byte of the result comes from the k-th of eight parts of the mask.
        bits = torch.bitwise_left_shift(places.view(torch.int64).view(8, -1), _shifts()).sum(0)
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        return cls(x.shape, probability, x.device, bits, strides), places[:count].as_strided(x.shape, strides)

    def again(self) -> Tensor:
        """The mask as a tensor of uint8, without the ``scale``; a product with it has the dtype of the other tensor.

        If it is drawn from a seed, four elements share one 64-bit draw, which makes drawing it twice cheaper than one
        ``F.dropout``; the probability is then exact to 1 / 65536.
        """
        count = self.shape.numel()
        if isinstance(self.source, Tensor):
            places = torch.bitwise_right_shift(self.source, _shifts()).bitwise_and_(_ONES).view(-1).view(torch.uint8)
            return places[:count].as_strided(self.shape, self.strides)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.source)
        if self.device.type == "mps":  # cannot draw over the whole range of int64
            lanes = torch.empty(count, dtype=torch.int32, device=self.device)
            lanes.random_(-(_LANES // 2), _LANES // 2, generator=generator)
        else:
            words = torch.empty(-(-count // 4), dtype=torch.int64, device=self.device)
            words.random_(-(1 << 63), None, generator=generator)
            lanes = words.view(torch.int16)[:count]
        return (lanes >= self._dropped_lanes - _LANES // 2).view(torch.uint8).view(self.shape)

    def noise(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask times the ``scale``, as ``F.dropout`` multiplies by it."""
        return mask.to(dtype).mul_(self.scale)

    @property
    def scale(self) -> float:
        """1 / (share of elements kept), for the exact probability of the mask."""
        kept = 1 - self.probability if isinstance(self.source, Tensor) else 1.0 - self._dropped_lanes / _LANES
        return 1.0 / kept if kept > 0 else 0.0

    @property
    def _dropped_lanes(self) -> int:
        return min(round(self.probability * _LANES), _LANES - 1)


def _shifts() -> Tensor:
    """The shifts of a word's eight bits in each byte, (8, 1)."""
    return torch.arange(8).unsqueeze(1)


def _seeded(device: torch.device) -> bool:
    """Whether masks are drawn from a seed, which is fast, instead of as ``F.dropout`` draws them."""
    return device.type != "cpu"


class _SeededDropout(torch.autograd.Function):
    """Dropout that saves its mask as bits, or as a seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.keep, mask = KeepMask.drawn(x, probability)
        return x * ctx.keep.noise(mask, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.keep.noise(ctx.keep.again(), gradients[0].dtype), None


def seeded_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """Dropout of ``x`` (any shape) that saves less than a mask for backward; see ``KeepMask``."""
    if not dropout.is_active:
        return x
    if dropout.probability >= 1.0 or composes():
        return F.dropout(x, dropout.probability)
    return _SeededDropout.apply(x, dropout.probability)  # type: ignore[no-untyped-call]


class _LowRank(torch.autograd.Function):
    """``scaling * B(A(dropout(x)))``, added to ``onto`` or to the output of a frozen linear layer.

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
        ctx.pieces = _takes_pieces(x, lora_A, dtype)
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
            origin = origin_of(x)
            ctx.recomputation = None if origin is None else origin.recomputation
            if origin is not None:
                origin.recomputation.add_reader()
            inputs = (x,) if origin is None else origin.inputs
            weight = None if frozen is None else frozen[0]
            ctx.save_for_backward(lora_A, lora_B, hidden if ctx.needs_input_grad[2] else None, weight, *inputs)
            pieces = ctx.pieces and total is not None
            left, right = _pieces(hidden, lora_B, wide, 1) if pieces else (hidden, lora_B.to(dtype))
            if frozen is not None and total is not None:
                _linear(_as_rows(x), *frozen, out=_as_rows(total)).addmm_(left, right.T)
                return total
            if onto is None:
                return (left @ right.T).view(shape)
            if pieces and total is not None:
                torch.addmm(_as_rows(onto), left, right.T, out=_as_rows(total))
                return total
            room = _part(buffer, hidden.shape[0], out_features) if total is None else _as_rows(total)
            product = torch.mm(left, right.T, out=room)
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
            upstream = rows = _as_rows(gradients[0])
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


def _takes_pieces(x: Tensor, lora_A: Tensor, dtype: torch.dtype) -> bool:
    """Whether wide products are computed in bfloat16, from pieces of the factors; see ``_pieces``."""
    least = max(_LEAST_WIDE, _TOKENS_TO_RANK * lora_A.numel())
    if x.dtype != torch.bfloat16 or dtype != torch.float32 or x.numel() < least:
        return False
    return x.device.type == "cuda" or (x.device.type == "cpu" and onednn_multiplies(torch.bfloat16))


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
    if mask is not None:
        mask = mask.reshape(wide.shape)
        # A CPU is slow at products of integers and half precision.
        wide.mul_(mask if wide.dtype.itemsize >= 4 else mask.to(wide.dtype))
    return wide if weight is None else wide.addmm_(rows, weight)


def _differentiable_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for higher derivatives."""
    lora_A, lora_B, _, weight, *inputs = ctx.saved_tensors
    x = inputs[0] if ctx.recomputation is None else ctx.recomputation.differentiable_output(inputs)
    with without_autocast(x.device.type):
        mask = None if ctx.keep is None else ctx.keep.again()
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


def _factor(ctx: Any) -> float | Tensor:
    """The scaling, times the scale of dropout."""
    scaling: float | Tensor = ctx.scaling
    return scaling if ctx.keep is None else scaling * ctx.keep.scale


def _as_rows(x: Tensor) -> Tensor:
    """(…, features) as (tokens, features), even if there are no features or no tokens."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _dropped_input(x: Tensor, mask: Tensor | None, dtype: torch.dtype, buffer: Tensor | None) -> Tensor:
    """``x`` as (tokens, in) in the compute dtype, with dropped elements set to zero."""
    flat = _as_rows(x)
    part = _part(buffer, *flat.shape)
    if mask is not None and x.dtype.itemsize >= 4:
        return torch.mul(flat, mask.reshape(flat.shape), out=part)
    dropped = flat if mask is None else mask.reshape(flat.shape).to(x.dtype).mul_(flat)
    return dropped.to(dtype) if part is None else part.copy_(dropped)


def _is_small(x: Tensor) -> bool:
    """Whether what ordinary operations save for backward is less than a call of a custom function costs.

    It is not for an input that can be recomputed, of which the custom function saves nothing.
    """
    return x.numel() < _LEAST_LEAN and x.device.type == "cpu" and origin_of(x) is None


def _records(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    if _is_small(x) or (x.dtype == lora_A.dtype == dtype and not (probability or _records(x, lora_A, lora_B, onto))):
        cast = x.to(dtype)
        hidden = F.linear(F.dropout(cast, probability) if probability else cast, lora_A.to(dtype))
        delta = F.linear(hidden * scaling, lora_B.to(dtype))
        return delta if onto is None else (onto + delta.to(onto.device)).to(onto.dtype)
    if onto is not None and (onto.device != x.device or torch.promote_types(onto.dtype, dtype) != dtype):
        return add_delta(onto, low_rank_linear(x, factors, probability).to(onto.device))
    return _LowRank.apply(x, lora_A, lora_B, onto, None, scaling, probability, dtype)  # type: ignore[no-untyped-call]


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, probability: float
) -> Tensor | None:
    """``W x + b + scaling * B(A(dropout(x)))`` in one function, whose backward needs no buffer for each summand.

    Args:
        x: (..., in).
        weight: W of a frozen layer, (out, in).
        bias: the layer's bias, (out,), or None.
        factors: A, B and their scaling.
        probability: probability of dropout of the input.

    Returns:
        (..., out), with the same bits as the layer plus ``low_rank_linear``; None if that is not guaranteed: for
        other dtypes than float32, float64, and factors in float32 on many tokens in bfloat16, for several devices,
        and for a layer that is trained.
    """
    lora_A, lora_B, scaling = factors
    dtype, device = lora_A.dtype, x.device
    alike = x.dtype == weight.dtype and dtype == lora_B.dtype
    alike = alike and device == weight.device == lora_A.device == lora_B.device
    trained = weight.requires_grad
    if bias is not None:
        alike = alike and bias.dtype == x.dtype and bias.device == device
        trained = trained or bias.requires_grad
    if not alike or trained or probability >= 1.0 or torch.is_autocast_enabled(device.type):
        return None
    if x.dtype == dtype and dtype in _EXACT:
        if _is_small(x):
            hidden = F.linear(F.dropout(x, probability) if probability else x, lora_A) * scaling
            return F.linear(x, weight, bias) + F.linear(hidden, lora_B)
        # Of two passes with one mask, as in activation checkpointing, the first may record nothing.
        if not probability and not _records(x, lora_A, lora_B):
            output, hidden = F.linear(x, weight, bias), _as_rows(F.linear(x, lora_A) * scaling)
            output.view(hidden.shape[0], output.shape[-1]).addmm_(hidden, lora_B.T)
            return output
    elif not _takes_pieces(x, lora_A, dtype):
        return None
    return _LowRank.apply(x, lora_A, lora_B, None, (weight, bias), scaling, probability, dtype)  # type: ignore[no-untyped-call]
