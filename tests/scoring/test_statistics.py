"""Intervals and tests against published values, and against a bootstrap written in another way."""

from __future__ import annotations

import math
import random

import pytest

from nbpeft.scoring.statistics import bootstrap, mcnemar, paired_bootstrap, weighted_mean, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_intervals(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(count - successes, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_nothing_is_known_without_items() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(map(math.isnan, bootstrap([], [], 0)))
    assert math.isnan(weighted_mean([], []))


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [(12, 3, 0.03515625), (3, 12, 0.03515625), (0, 5, 0.0625), (5, 5, 1.0), (0, 0, 1.0), (121, 59, 4.4341e-06)],
)
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p, rel=1e-3)


def test_the_bootstrap_is_near_the_normal_interval_and_the_same_for_one_seed() -> None:
    draw = random.Random(1)
    values = [draw.gauss(3, 2) for _ in range(400)]
    weights = [1.0] * len(values)
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    low, high = bootstrap(values, weights, 0)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.04)
    assert bootstrap(values, weights, 0) == (low, high) != bootstrap(values, weights, 1)
    assert bootstrap([2.0] * 9, weights[:9], 0) == (2.0, 2.0)


def test_weights_count_as_repeated_items() -> None:
    assert weighted_mean([1.0, 4.0], [3.0, 1.0]) == pytest.approx(1.75)
    low, high = bootstrap([1.0, 4.0], [3.0, 1.0], 0)
    assert (low, high) == (1.0, 4.0)


def test_the_paired_bootstrap_sees_a_difference_and_no_other() -> None:
    draw = random.Random(2)
    noise = [draw.gauss(0, 1) for _ in range(60)]
    ones = [1.0] * 60
    assert paired_bootstrap([value + 1 for value in noise], ones, 0) < 0.001
    mean = sum(noise) / 60
    assert paired_bootstrap([value - mean for value in noise], ones, 0) > 0.8
    assert paired_bootstrap([0.0] * 60, ones, 0) == 1.0
    assert math.isnan(paired_bootstrap([math.nan, 1.0], [1.0, 1.0], 0))
    few = [paired_bootstrap([0.5, *([2.0] * more), 0.0], ones[: more + 2], 0) for more in range(4)]
    assert few == [1.0, 0.5, 0.25, 0.125]  # all on one side
