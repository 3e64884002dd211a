"""LoftQ: a quantized base weight, and factors that compensate the error (Li et al. 2023, arXiv:2310.08659).

    Q, A, B = argmin ||W - Q - s B A||    alternately: Q = quantize(W - s B A), s B A = the rank-r part of W - Q

The values are those of bitsandbytes (nf4 in blocks of 64, int8 by row), computed here without the library or an
accelerator. PEFT omits the scaling s, and so adds s times the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from nbpeft.engine.methods.lora.initialization.decompositions import nearest_product

BLOCK = 64
"""Values that share a constant under a normal float."""
_OFFSET = 0.9677083
"""Outermost quantile of a normal float: (1 - 1/30 + 1 - 1/32) / 2, see QLoRA, arXiv:2305.14314."""
_LARGEST_INT8 = 127

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight.

    Attributes:
        codes: several codes a byte (normal floats) or int8 values.
        constants: largest absolute value of each block, or of each row; float32.
        bits: 2, 4 or 8.
        shape: shape of the weight.
    """

    codes: Tensor
    constants: Tensor
    bits: int
    shape: torch.Size

    def dequantize(self) -> Tensor:
        """The dequantized weight, float32."""
        if self.bits == 8:
            return (self.codes.float() * (self.constants / _LARGEST_INT8)).view(self.shape)
        grid = torch.tensor(normal_float(self.bits), device=self.codes.device)
        shifts = torch.arange(0, 8, self.bits, device=self.codes.device, dtype=torch.uint8)
        codes = (self.codes[:, None] >> shifts) & (2**self.bits - 1)
        values = grid[codes.flatten().int()].view(-1, BLOCK) * self.constants
        return values.flatten()[: self.shape.numel()].view(self.shape)


@cache
def normal_float(bits: int) -> tuple[float, ...]:
    """The values of a normal float between -1 and 1, ascending: ``2 ** bits`` of them."""
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    above, below = (
        [quantile(_OFFSET + (0.5 - _OFFSET) * step / count) for step in range(count)] for count in (half, half - 1)
    )
    largest = max(above)
    return tuple(sorted([*(value / largest for value in above), 0.0, *(-value / largest for value in below)]))


def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """Quantizes a weight in a module's storage order.

    Args:
        weight: (rows, columns), floating point.
        bits: 2 or 4 for normal floats in blocks of 64 in storage order, 8 for int8 by row.
    """
    weight = weight.float()
    if bits == 8:
        largest = weight.abs().amax(1, keepdim=True)
        codes = (weight * (_LARGEST_INT8 / largest.clamp_min(torch.finfo(torch.float32).tiny))).round()
        return QuantizedWeight(codes.to(torch.int8), largest, bits, weight.shape)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    grid = torch.tensor(normal_float(bits), device=weight.device)
    middles = (grid[1:] + grid[:-1]) / 2
    codes = torch.bucketize(blocks / largest.clamp_min(torch.finfo(torch.float32).tiny), middles, out_int32=True)
    parts = codes.to(torch.uint8).view(-1, 8 // bits)
    packed = parts[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, place] << (place * bits)
    return QuantizedWeight(packed, largest, bits, weight.shape)


def loftq_start(
    weight: Tensor, stored: Callable[[Tensor], Tensor], rank: int, *, bits: int, iterations: int, factors: bool = True
) -> tuple[QuantizedWeight, Factors | None]:
    """The quantized weight, and the factors whose product is closest to the quantization error.

    Args:
        weight: canonical, (out, in).
        stored: converts a canonical weight to the module's storage order, and back.
        rank: rank of the factors.
        bits: bits of the quantized weight.
        iterations: number of alternations.
        factors: whether to return the factors; a loaded adapter has them already.

    Returns:
        The weight as the module stores it, and A (rank, in) and B (out, rank) in float32.
    """
    weight = weight.float()
    best: tuple[float, QuantizedWeight, Factors | None] | None = None
    target = weight
    for left in reversed(range(iterations)):
        quantized = quantize(stored(target), bits)
        if iterations == 1 and not factors:
            return quantized, None
        lost = weight - stored(quantized.dequantize())
        lora_A, lora_B = nearest_product(lost, rank)
        product = lora_B @ lora_A
        error = float((lost - product).norm())
        if best is None or error < best[0]:  # with few bits the alternation need not converge
            best = error, quantized, (lora_A, lora_B)
        if left:
            target = weight - product
    assert best is not None
    return best[1], best[2]
