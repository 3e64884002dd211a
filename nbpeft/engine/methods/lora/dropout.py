"""Dropout of an adapter's input, whose mask is stored compactly.

On the CPU the mask is drawn as ``F.dropout`` draws it, so that the same seed drops the same elements, and is stored as
bits. On other devices it takes a byte per element, as torch's own does, and is drawn by the device. Activation
checkpointing restores both generators, so recomputation draws the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.kernels.numerics import composes

_ONES = 0x0101010101010101
"""The lowest bit of each byte of an int64."""
_WORD = 64
"""Bits of an int64, in each of which a mask of as many elements is stored."""


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


@dataclass(frozen=True)
class KeepMask:
    """A dropout mask of zeros (dropped) and ones, stored compactly.

    Attributes:
        shape: shape of the input.
        probability: probability of a zero.
        stored: the mask; of an input on the CPU its bits, int64.
        strides: of a mask stored as bits, which is drawn in the memory order of a dense input; None for any other.
    """

    shape: torch.Size
    probability: float
    stored: Tensor
    strides: tuple[int, ...] | None = None

    @classmethod
    def drawn(cls, x: Tensor, probability: float) -> tuple[Self, Tensor]:
        """Draws a new mask for an input, and returns it with the mask as a tensor; see ``again``.

        Args:
            x: the input.
            probability: probability of a zero.
        """
        if x.device.type != "cpu":
            mask = torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - probability)
            return cls(x.shape, probability, mask), mask
        count = x.numel()
        places = torch.empty(-(-count // _WORD) * _WORD, dtype=torch.uint8)
        places[:count].bernoulli_(1 - probability)
        places[count:] = 0
        # Eight bytes are a word; bit k of each byte of the result comes from the k-th of eight parts of the mask.
        bits = torch.bitwise_left_shift(places.view(torch.int64).view(8, -1), _shifts()).sum(0)
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        return cls(x.shape, probability, bits, strides), places[:count].as_strided(x.shape, strides)

    def again(self) -> Tensor:
        """The mask as a tensor of uint8 or bool, without the ``scale``; a product has the other tensor's dtype."""
        if self.strides is None:
            return self.stored
        places = torch.bitwise_right_shift(self.stored, _shifts()).bitwise_and_(_ONES).view(-1).view(torch.uint8)
        return places[: self.shape.numel()].as_strided(self.shape, self.strides)

    def noise(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask times the ``scale``, as ``F.dropout`` multiplies by it."""
        return mask.to(dtype).mul_(self.scale)

    @property
    def scale(self) -> float:
        """1 / (share of elements kept)."""
        return 1.0 / (1 - self.probability) if self.probability < 1 else 0.0


def _shifts() -> Tensor:
    """The shifts of a word's eight bits in each byte, (8, 1)."""
    return torch.arange(8).unsqueeze(1)


class _LeanDropout(torch.autograd.Function):
    """Dropout on the CPU that stores its mask as bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.keep, mask = KeepMask.drawn(x, probability)
        return x * ctx.keep.noise(mask, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.keep.noise(ctx.keep.again(), gradients[0].dtype), None


def lean_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """Dropout of ``x`` (any shape) that stores no more than its mask for backward; see ``KeepMask``."""
    if not dropout.is_active:
        return x
    if dropout.probability >= 1.0 or x.device.type != "cpu" or composes():
        return F.dropout(x, dropout.probability)
    return _LeanDropout.apply(x, dropout.probability)
