"""Intervals and tests against published values, and their coverage for few items."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest

from nbpeft.scoring import statistics
from nbpeft.scoring.statistics import interval_of_mean, mcnemar, sign_flips, weighted_mean, wilson


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
    for count in range(3):  # no interval says something of less than three items
        low, high, kind = interval_of_mean([0.5] * count, [1.0] * count, 0)
        assert math.isnan(low) and math.isnan(high) and not kind
    assert math.isnan(weighted_mean([], []))


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [(12, 3, 0.03515625), (3, 12, 0.03515625), (0, 5, 0.0625), (5, 5, 1.0), (0, 0, 1.0), (121, 59, 4.4341e-06)],
)
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p, rel=1e-3)


def test_mcnemar_of_many_items_is_exact_and_costs_little() -> None:
    for fixed, broken in ((40, 25), (500, 430)):
        tail = sum(math.comb(fixed + broken, number) for number in range(min(fixed, broken) + 1))
        assert mcnemar(fixed, broken) == 2 * tail / 2 ** (fixed + broken)
    mcnemar.cache_clear()
    started = time.process_time()
    assert mcnemar(9_800, 10_200) == pytest.approx(0.004781, rel=1e-3)
    assert mcnemar(10_200, 9_800) == mcnemar(9_800, 10_200)
    assert time.process_time() - started < 5  # a sum of binomials took more than a minute
    assert mcnemar.cache_info().hits == 1


def test_the_bootstrap_is_near_the_normal_interval_and_the_same_for_one_seed() -> None:
    draw = random.Random(1)
    values = [draw.gauss(3, 2) for _ in range(400)]
    weights = [1.0] * len(values)
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    low, high, kind = interval_of_mean(values, weights, 0)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.04) and kind == "bootstrap"
    assert interval_of_mean(values, weights, 0) == (low, high, kind) != interval_of_mean(values, weights, 1)
    assert interval_of_mean([2.0] * 40, weights[:40], 0)[:2] == (2.0, 2.0)


def test_intervals_of_few_items_are_those_of_the_t_distribution() -> None:
    low, high, kind = interval_of_mean([1.0, 2.0, 4.0], [1.0] * 3, 0)
    half = 4.302653 * math.sqrt(7 / 3 / 3)  # the variance of the three is 7/3
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half)) and kind == "t"
    stats: Any = pytest.importorskip("scipy.stats")
    assert [stats.t.ppf(0.975, number) for number in range(2, 29)] == pytest.approx(statistics._T, abs=1e-6)


@pytest.mark.parametrize("count", [3, 5, 8, 12, 20, 29, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_interval_contains_the_true_mean_as_often_as_it_says(count: int, weighted: bool) -> None:
    draw, inside, trials = random.Random(count), 0, 600
    for trial in range(trials):
        weights = [float(draw.randint(1, 3)) if weighted else 1.0 for _ in range(count)]
        low, high, _ = interval_of_mean([draw.gauss(1, 2) for _ in range(count)], weights, trial)
        inside += low <= 1 <= high
    error = math.sqrt(0.95 * 0.05 / trials)
    # Three standard errors; weights of few items, and resamples, are approximations that lack up to two percent.
    assert inside / trials > 0.95 - 3 * error - (0.02 if weighted or count >= 30 else 0)
    assert inside / trials < 0.95 + 3 * error + (0.02 if weighted else 0)


@pytest.mark.parametrize("count", [5, 6, 8, 12, 13, 20])
def test_no_difference_is_called_one_in_five_percent_at_most(count: int) -> None:
    draw, found, trials = random.Random(count), 0, 400
    for trial in range(trials):
        weights = [float(draw.randint(1, 5)) for _ in range(count)]
        found += sign_flips([draw.gauss(0, 1) for _ in range(count)], weights, trial) < 0.05
    assert found / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_weights_count_in_the_mean_and_in_its_interval() -> None:
    assert weighted_mean([1.0, 4.0], [3.0, 1.0]) == pytest.approx(1.75)
    low, high, _ = interval_of_mean([1.0, 4.0, 1.0], [3.0, 1.0, 0.0], 0)
    assert (low + high) / 2 == pytest.approx(1.75)


def test_flipped_signs_see_a_difference_and_no_other() -> None:
    draw = random.Random(2)
    noise = [draw.gauss(0, 1) for _ in range(60)]
    ones = [1.0] * 60
    assert sign_flips([value + 1 for value in noise], ones, 0) < 0.001
    mean = sum(noise) / 60
    assert sign_flips([value - mean for value in noise], ones, 0) > 0.8
    assert sign_flips([0.0] * 60, ones, 0) == 1.0
    assert math.isnan(sign_flips([math.nan, 1.0], [1.0, 1.0], 0))
    few = [sign_flips([0.5, *([2.0] * more), 0.0], ones[: more + 2], 0) for more in range(4)]
    assert few == [1.0, 0.5, 0.25, 0.125]  # all on one side
