"""Rounds blocks of a weight to the nearest of 16 levels (nf4) on a CPU, many times faster than a search.

A number divided by the largest magnitude of its block is between -1 and 1. A table contains the nearest level for
65,537 steps of that range, so that rounding a number is one look-up. The result can differ from the nearest level only
within 1/65,536 of the midpoint between two levels, where both are equally good.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_HALF = 1 << 15
"""Steps of the table from 0 to 1."""
_SMALLEST = 1e-30
"""Blocks whose numbers are all smaller are treated as zeros."""
_CHUNK = 1 << 16
"""Numbers that are rounded at a time, so that intermediate results stay in the CPU cache."""


def round_blocks(weight: Tensor, size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to 4-bit codes and one constant for each block.

    Args:
        weight: on the CPU, contiguous, floating-point, any shape.
        size: numbers in a block, even; the last block may be shorter.
        code: the value of each of the 16 codes, float32, from -1 to 1.

    Returns:
        Codes, (bytes, 1) uint8, two in each byte, the first in the upper half; and the constants that bring these
        codes nearest to the weight (least squares), (blocks,) float32.
    """
    flat = weight.reshape(-1)
    blocks = -(-flat.numel() // size)
    codes = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8)
    constants = torch.empty(blocks)
    rounding = _Chunk(min(max(_CHUNK // size, 1), blocks), size, code)
    for first in range(0, blocks, rounding.rows):
        part = flat[first * size : (first + rounding.rows) * size]
        pairs, constants[first : first + rounding.rows] = rounding.round(part)
        codes[first * size // 2 :][: len(pairs), 0] = pairs
    return codes, constants


@functools.lru_cache(maxsize=4)
def _table(values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The nearest code for each step of the range, int32, and the value of each code, float32."""
    code = torch.tensor(values)
    levels, order = code.sort(stable=True)
    steps = (torch.arange(2 * _HALF + 1, dtype=torch.float64) - _HALF) / _HALF
    places = torch.bucketize(steps, ((levels[1:] + levels[:-1]) / 2).double())
    return order.to(torch.int32)[places], code


class _Chunk:
    """Reused buffers for rounding some blocks at a time, because allocation would cost more than the arithmetic."""

    def __init__(self, rows: int, size: int, code: Tensor) -> None:
        self.rows = rows
        self._table, self._code = _table(tuple(code.tolist()))
        self._numbers, self._work = torch.empty(2, rows, size)
        self._steps, self._codes = torch.empty(2, rows, size, dtype=torch.int32)

    def round(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds some blocks.

        Args:
            part: flat numbers of at most ``rows`` blocks.

        Returns:
            Pairs of codes, int32, and constants; the next call overwrites both.
        """
        size = self._numbers.shape[1]
        rows = -(-part.numel() // size)
        work, steps, codes = (buffer[:rows] for buffer in (self._work, self._steps, self._codes))
        if part.dtype == torch.float32 and part.numel() == rows * size:
            numbers = part.view(rows, size)
        else:
            numbers = self._numbers[:rows]
            numbers.view(-1)[: part.numel()].copy_(part)
            numbers.view(-1)[part.numel() :].zero_()
        largest = torch.abs(numbers, out=work).amax(1)
        torch.mul(numbers, (_HALF / largest.clamp(min=_SMALLEST)).unsqueeze(1), out=work).add_(_HALF + 0.5)
        steps.copy_(work if bool(largest.sum().isfinite()) else work.nan_to_num_(_HALF, _HALF, _HALF))
        torch.index_select(self._table, 0, steps.view(-1), out=codes.view(-1))
        # The buffer of the steps is no longer needed: use it for the values of the codes.
        values = steps.view(torch.float32)
        torch.index_select(self._code, 0, codes.view(-1), out=values.view(-1))
        length = torch.mul(values, values, out=work).sum(1)
        product = torch.mul(values, numbers, out=work).sum(1)
        constants = torch.where(length > 0, product / length, largest)
        flat = codes.view(-1)[: part.numel() + part.numel() % 2]
        return torch.add(flat[1::2], flat[0::2], alpha=16), constants
