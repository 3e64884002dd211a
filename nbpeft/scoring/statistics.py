"""Intervals and paired tests: Wilson, bootstrap, McNemar."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEVEL = 0.95
"""The confidence level of all intervals."""
_Z = 1.959963984540054
"""The 0.975 quantile of the normal distribution."""
_RESAMPLES = 2_000
_AT_ONCE = 4_000_000
"""The greatest number of indices that are drawn at once."""


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The Wilson score interval of a share at the level 0.95.

    Args:
        successes: number of items that are right.
        count: number of items.

    Returns:
        The lower and the upper bound; 0 and 1 without items.
    """
    if not count:
        return 0.0, 1.0
    share, squared = successes / count, _Z * _Z / count
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / count + squared / (4 * count))
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == count else middle + half


def bootstrap(values: Sequence[float], weights: Sequence[float], seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of a weighted mean at the level 0.95; items are resampled.

    Args:
        values: the value of each item.
        weights: the weight of each item in the mean.
        seed: seed of the resamples.

    Returns:
        The lower and the upper bound; NaN without items or with a value that is NaN.
    """
    if not values or any(math.isnan(value) for value in values):
        return math.nan, math.nan
    means = _resampled(values, weights, seed)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def mcnemar(fixed: int, broken: int) -> float:
    """The two-sided p-value of the exact McNemar test.

    Args:
        fixed: number of items that only the second one has right.
        broken: number of items that only the first one has right.
    """
    count = fixed + broken
    tail = sum(math.comb(count, number) for number in range(min(fixed, broken) + 1))
    return min(1.0, float(2 * tail / 2**count))


def paired_bootstrap(differences: Sequence[float], weights: Sequence[float], seed: int) -> float:
    """The two-sided p-value that a weighted mean of paired differences is 0, by the bootstrap.

    Few items always lie on one side of 0 by chance, which resamples of them cannot show. So the value is at least that
    of a test of their signs: 1 for one difference, 0.5 for two, 0.25 for three.

    Args:
        differences: the difference of each item.
        weights: the weight of each item in the mean.
        seed: seed of the resamples.

    Returns:
        The p-value; NaN with a difference that is NaN.
    """
    if any(math.isnan(value) for value in differences):
        return math.nan
    count = sum(map(bool, differences))
    if not count:
        return 1.0
    means = _resampled(differences, weights, seed)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, max(2 * (tail + 1) / (_RESAMPLES + 1), 2.0 ** (1 - count)))


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean of values; NaN without items or weights."""
    total = math.fsum(weights)
    return math.fsum(map(math.prod, zip(values, weights, strict=True))) / total if total else math.nan


def _resampled(values: Sequence[float], weights: Sequence[float], seed: int) -> Tensor:
    """The weighted mean of each resample, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.tensor(weights, dtype=torch.float64)
    weighted = torch.tensor(values, dtype=torch.float64) * weight
    each = max(1, _AT_ONCE // len(values))
    means = []
    for start in range(0, _RESAMPLES, each):
        shape = (min(each, _RESAMPLES - start), len(values))
        drawn = torch.randint(len(values), shape, generator=generator)
        means.append(weighted[drawn].sum(1) / weight[drawn].sum(1))
    return torch.cat(means)
