"""The arithmetic of bitsandbytes' 4-bit codes: blocks of a weight in row-major order, each with one scale.

References: QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NESTED_BLOCK = 256
"""Number of constants in a block of nested (double) quantization, which quantizes the constants too."""
_FITTED_BLOCKS = 1024
"""Number of blocks that are fitted at a time, so that fitting needs little memory compared with a weight."""


def in_blocks(values: Tensor, size: int) -> Tensor:
    """Splits a flat tensor into (blocks, size); the last block is padded with zeros."""
    return nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)


def fitted(weight: Tensor, data: Tensor, constants: Tensor, size: int, quant_type: str) -> Tensor:
    """Computes the constant of each block that brings its codes nearest to the weight (least squares).

    Args:
        weight: the weight before quantization, any shape, floating-point.
        data: its codes, two in each byte, in row-major order.
        constants: float32, (blocks,); returned unchanged for a block whose codes are all zero.
        size: numbers in a block.
        quant_type: ``nf4`` or ``fp4``.

    Returns:
        (blocks,) float32.
    """
    flat, codes = weight.reshape(-1), data.view(torch.uint8).view(-1)
    found: Tensor = constants.clone()
    for first in range(0, found.numel(), _FITTED_BLOCKS):
        chosen = found[first : first + _FITTED_BLOCKS]
        values = in_blocks(flat[first * size : (first + _FITTED_BLOCKS) * size].float(), size)
        part = codes[first * size // 2 : (first + chosen.numel()) * size // 2]
        unit = torch.ops.bitsandbytes.dequantize_4bit.default(
            part, torch.ones_like(chosen), size, quant_type, (2 * part.numel(),), torch.float32
        )
        unit = in_blocks(unit.view(-1)[: weight.numel() - first * size], size)
        length = unit.square().sum(1)
        torch.where(length > 0, values.mul_(unit).sum(1) / length, chosen, out=chosen)
    return found
