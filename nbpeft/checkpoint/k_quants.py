"""llama.cpp's block formats q4_k, q5_k and q6_k, byte by byte as its own quantizer writes them.

A block has 256 consecutive weights of a row, in groups of 32 (q4_k, q5_k) or 16 (q6_k). A group has a scale, and in
q4_k and q5_k an offset, which are stored in 6 or 8 bits each under one or two float16 factors of the block. Several
scales are tried for each group, and the one with the least weighted squared error is used.

The arithmetic is float32, and sums run over a group in order: another order would round differently. Groups are
computed together, in arrays of shape (size of a group, number of groups).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[Any]
"""An array of float32."""
Bytes = NDArray[Any]
"""An array of uint8."""

BLOCK = 256
_PART = 512
"""Blocks that are computed at a time: few enough for the arrays to stay in the processor's cache."""
_ZERO = np.float32(1e-15)
"""A group whose largest weight is smaller is stored as zeros."""
_ONE = np.float32(1)


@dataclass(frozen=True)
class _Search:
    """The scales that are tried for a group with offsets: ``levels / range`` with slightly other numbers of levels."""

    levels: int
    first: float
    step: float
    count: int


_SEARCH = {"q4_k": _Search(15, -1.0, 0.1, 21), "q5_k": _Search(31, -0.5, 0.1, 16)}
_WEIGHTED_SEARCH = {"q4_k": _Search(15, -0.9, 0.05, 37), "q5_k": _Search(31, -0.9, 0.05, 37)}
"""The same with the importance of columns."""


def quantize(weight: Floats, stored_as: str, importance: Floats | None = None) -> Bytes:
    """Returns a matrix in one of the formats.

    Args:
        weight: the matrix, (rows, columns) in float32; columns divide by 256.
        stored_as: ``q4_k``, ``q5_k`` or ``q6_k``.
        importance: how much an error in each column counts, (columns,): the mean square of the inputs that the column
            is multiplied with. None if it is unknown.

    Returns:
        Bytes of shape (rows, bytes of a row): 144, 176 or 210 for each block.
    """
    rows, columns = weight.shape
    blocks = np.ascontiguousarray(weight, np.float32).reshape(-1, BLOCK)
    per_row = columns // BLOCK
    weights = None if importance is None else np.asarray(importance, np.float32).reshape(per_row, BLOCK)
    convert = _symmetric if stored_as == "q6_k" else partial(_with_offsets, stored_as=stored_as)

    def converted(start: int) -> Bytes:
        part = blocks[start : start + _PART]
        places = np.arange(start, start + len(part)) % per_row
        with np.errstate(all="ignore"):  # groups of zeros are divided by zero, and set afterwards
            return convert(part, None if weights is None else weights[places])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(converted, range(0, len(blocks), _PART)))
    return np.concatenate(parts).reshape(rows, -1)


def _with_offsets(blocks: Floats, importance: Floats | None, *, stored_as: str) -> Bytes:
    """q4_k and q5_k: a weight is ``scale * level - offset``; returns one row of bytes for each block."""
    x = _groups(blocks, 32)
    if importance is None:
        search = _SEARCH[stored_as]
        mean = np.sqrt(_sum(x * x) / np.float32(32))
        weights = mean + np.abs(x)
        scales, offsets, levels = _asymmetric(x, weights, search)
        scale, offset = _largest(scales), _largest(offsets)
        codes = [_in_six_bits(values, largest) for values, largest in ((scales, scale), (offsets, offset))]
        factors = [largest / np.float32(63) for largest in (scale, offset)]
    else:
        search = _WEIGHTED_SEARCH[stored_as]
        variance = np.repeat(np.float32(2) * _sum(blocks.T * blocks.T) / np.float32(BLOCK), 8)
        weights = _groups(importance, 32) * np.sqrt(variance + x * x)
        scales, offsets, levels = _asymmetric(x, weights, search)
        total = _sum(weights)
        found = [_positive(values.reshape(-1, 8).T, total.reshape(-1, 8).T, 63) for values in (scales, offsets)]
        factors, codes = [factor for factor, _ in found], [code.T for _, code in found]
    stored = [factor.astype(np.float16) for factor in factors]
    step, shift = (
        (factor.astype(np.float32)[:, None] * code.astype(np.float32)).reshape(-1)
        for factor, code in zip(stored, codes, strict=True)
    )
    again = np.clip(np.rint((x + shift) / step), 0, search.levels)
    levels = np.where(step != 0, again, levels)
    whole = _blocks(levels)
    low = _pair(whole)
    head = [_raw(stored[0]), _raw(stored[1]), _packed_scales(*codes)]
    if stored_as == "q4_k":
        return np.concatenate([*head, low], axis=1)
    high = whole.reshape(-1, 8, 32) >> 4
    return np.concatenate([*head, _bits(high), low], axis=1)


def _asymmetric(x: Floats, weights: Floats, search: _Search) -> tuple[Floats, Floats, Floats]:
    """Returns scale and offset of each group, and the level of each weight."""
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    total, total_x = _sum(weights), _sum(weights * x)
    top = np.float32(search.levels)
    inverse = top / (high - low)
    scale, offset = _ONE / inverse, low.copy()
    levels = np.clip(np.rint(inverse * (x - low)), 0, top)
    error = _error(scale, levels, offset, x, weights)
    for place in range(search.count):
        # From the best offset so far, not from the smallest weight, as llama.cpp does.
        inverse = (np.float32(search.first) + np.float32(search.step) * np.float32(place) + top) / (high - offset)
        tried = np.clip(np.rint(inverse * (x - offset)), 0, top)
        weighted = weights * tried
        sum_l, sum_ll, sum_lx = _sum(weighted), _sum(weighted * tried), _sum(weighted * x)
        determinant = total * sum_ll - sum_l * sum_l
        new_scale = (total * sum_lx - total_x * sum_l) / determinant
        new_offset = (sum_ll * total_x - sum_l * sum_lx) / determinant
        positive = new_offset > 0
        new_scale = np.where(positive, sum_lx / sum_ll, new_scale)
        new_offset = np.where(positive, np.float32(0), new_offset)
        new_error = _error(new_scale, tried, new_offset, x, weights)
        better = (determinant > 0) & (new_error < error)
        levels[:, better] = tried[:, better]
        for kept, new in ((error, new_error), (scale, new_scale), (offset, new_offset)):
            kept[better] = new[better]
    constant = high <= low
    scale[constant], offset[constant], levels[:, constant] = 0, low[constant], 0
    return scale, -offset, levels


def _error(scale: Floats, levels: Floats, offset: Floats, x: Floats, weights: Floats) -> Floats:
    difference = scale * levels + offset - x
    return _sum(weights * (difference * difference))


def _positive(x: Floats, weights: Floats, top: int) -> tuple[Floats, NDArray[Any]]:
    """Returns the factor of non-negative numbers (count, groups), and the code of each: ``x ≈ factor * code``."""
    largest = np.maximum(x.max(axis=0), np.float32(0))
    inverse = np.float32(top) / largest
    scale = _ONE / inverse
    best = _squares(x, scale, np.rint(inverse * x), weights)
    for place in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = (np.float32(0.1) * np.float32(place) + np.float32(top)) / largest
        found = _squares(x, _ONE / tried, np.minimum(np.rint(tried * x), top), weights)
        better = found < best
        best, inverse = np.where(better, found, best), np.where(better, tried, inverse)
    codes = np.minimum(np.rint(inverse * x), np.float32(top))
    sum_lx, sum_ll = _sum(weights * x * codes), _sum(weights * codes * codes)
    running = largest > 0
    for _ in range(5):
        changed = np.zeros_like(running)
        for value, code, weight in zip(x, codes, weights, strict=True):
            lx, ll = sum_lx - weight * value * code, sum_ll - weight * code * code
            new = np.minimum(np.rint(value * ll / lx), np.float32(top))
            with_new, squares = lx + weight * value * new, ll + weight * new * new
            better = running & (lx > 0) & (ll > 0) & (new != code)
            better &= with_new * with_new * sum_ll > sum_lx * sum_lx * squares
            code[better], sum_lx[better], sum_ll[better] = new[better], with_new[better], squares[better]
            changed |= better
        running = changed
    factor = np.where(largest > 0, sum_lx / sum_ll, np.float32(0))
    return factor, np.where(largest > 0, codes, 0).astype(np.int64)


def _squares(x: Floats, scale: Floats, codes: Floats, weights: Floats) -> Floats:
    difference = x - scale * codes
    return _sum(weights * difference * difference)


def _symmetric(blocks: Floats, importance: Floats | None) -> Bytes:
    """q6_k: a weight is ``scale * level``; returns one row of bytes for each block."""
    x = _groups(blocks, 16)
    weights = x * x if importance is None else _groups(importance, 16)
    place = np.abs(x).argmax(axis=0)
    extreme = x[place, np.arange(x.shape[1])]
    zero = np.abs(extreme) < _ZERO
    scale, levels = _signed(x, weights, extreme)
    scale[zero], levels[:, zero] = 0, -32
    of_block = scale.reshape(-1, 16)
    largest = of_block[np.arange(len(of_block)), np.abs(of_block).argmax(axis=1)]
    inverse = np.float32(-128) / largest
    factor = (_ONE / inverse).astype(np.float16)
    codes = np.minimum(np.rint(inverse[:, None] * of_block), 127)
    step = (factor.astype(np.float32)[:, None] * codes.astype(np.float32)).reshape(-1)
    levels = np.where(step != 0, np.clip(np.rint(x / step), -32, 31), levels)
    quarters = _blocks(levels + 32).reshape(-1, 2, 4, 32)
    first, second, third, fourth = quarters.transpose(2, 0, 1, 3)
    low = np.concatenate([first & 15 | (third & 15) << 4, second & 15 | (fourth & 15) << 4], axis=2)
    high = first >> 4 | second >> 4 << 2 | third >> 4 << 4 | fourth >> 4 << 6
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), _raw(codes.astype(np.int8)), _raw(factor)]
    made: Bytes = np.concatenate(parts, axis=1)
    made[np.abs(largest) < _ZERO] = 0
    return made


def _signed(x: Floats, weights: Floats, extreme: Floats) -> tuple[Floats, Floats]:
    """Returns the scale of each group, and the level of each weight in -32 … 31."""
    best = scale = levels = np.empty(0, np.float32)
    for place in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(32) + np.float32(0.1) * np.float32(place)) / extreme
        tried = np.clip(np.rint(inverse * x), -32, 31)
        sum_lx, sum_ll = _sum(weights * x * tried), _sum(weights * tried * tried)
        found = np.where(sum_ll != 0, sum_lx / sum_ll, np.float32(0))
        if place == 0:
            scale, best, levels = found, found * sum_lx, tried
            continue
        better = (sum_ll > 0) & (sum_lx * sum_lx > best * sum_ll)
        levels[:, better] = tried[:, better]
        scale[better], best[better] = found[better], (found * sum_lx)[better]
    return scale, levels


# Between blocks and groups, and bytes


def _groups(blocks: Floats, size: int) -> Floats:
    """Blocks, (blocks, 256), as groups, (size, groups)."""
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def _blocks(levels: Floats) -> Bytes:
    """Levels of groups as (blocks, 256)."""
    return levels.T.astype(np.uint8).reshape(-1, BLOCK)


def _sum(values: Floats) -> Floats:
    """Sums over the first axis, one row after the other."""
    total = np.zeros(values.shape[1], np.float32)
    for row in values:
        total += row
    return total


def _largest(values: Floats) -> Floats:
    """The largest of each block's eight numbers, at least 0."""
    found: Floats = np.maximum(values.reshape(-1, 8).max(axis=1), np.float32(0))
    return found


def _in_six_bits(values: Floats, largest: Floats) -> NDArray[Any]:
    inverse = np.where(largest > 0, np.float32(63) / largest, np.float32(0))
    codes = np.rint(inverse[:, None] * values.reshape(-1, 8)).astype(np.int64)
    found: NDArray[Any] = np.minimum(codes & 255, 63)
    return found


def _packed_scales(scales: NDArray[Any], offsets: NDArray[Any]) -> Bytes:
    """Eight scales and eight offsets of 6 bits each in 12 bytes."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = offsets[:, :4] | offsets[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _pair(levels: Bytes) -> Bytes:
    """The lower four bits of each level: two groups of 32 in 32 bytes."""
    halves = levels.reshape(-1, 4, 2, 32) & 15
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128)


def _bits(values: Bytes) -> Bytes:
    """One bit of each of eight groups in 32 bytes."""
    return np.packbits(values, axis=1, bitorder="little")[:, 0]


def _raw(values: NDArray[Any]) -> Bytes:
    """The bytes of an array, in rows."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
