from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from nbpeft.state import MemberState
from nbpeft.training.monitor.record import History, Smoothed, is_better, score_of
from tests.closeness import assert_close
from tests.untimed import given


def test_short_runs_keep_every_point():
    history = History(buckets=10)
    for step in range(1, 9):
        history.add(step, float(step))
    assert history.points() == tuple((step, float(step)) for step in range(1, 9))


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=400),
    st.integers(1, 7),
)
def test_bounded_ordered_and_extremes_survive(values, stride):
    history = History(buckets=16)
    given_points = [((index + 1) * stride, value) for index, value in enumerate(values)]
    for step, value in given_points:
        history.add(step, value)
    points = history.points()
    assert len(points) <= 32
    assert list(points) == sorted(points, key=lambda point: point[0])
    assert set(points) <= set(given_points)
    assert max(value for _, value in points) == max(values)
    assert min(value for _, value in points) == min(values)


def test_values_that_are_not_finite_are_left_out():
    history, smoothed = History(), Smoothed()
    for value in (1.0, math.nan, math.inf, 3.0):
        history.add(1 if value == 1.0 else 2, value)
        smoothed.add(value)
    assert history.points() == ((1, 1.0), (2, 3.0))
    assert smoothed.value is not None and 1.0 < smoothed.value < 3.0


@pytest.mark.parametrize(("steps", "within"), [(8, 2.5), (20, 5.5), (200, 10.5)])
def test_the_smoothed_value_of_a_short_run_lags_less(steps: int, within: float) -> None:
    """Of values that rise by 1, the lag is the mean age of the values in the average."""
    smoothed = Smoothed()
    for value in range(steps):
        smoothed.add(float(value))
    assert smoothed.value is not None and steps - 1 - within < smoothed.value < steps - 2


def test_smoothing_starts_at_the_first_value():
    smoothed = Smoothed()
    assert smoothed.value is None
    smoothed.add(5.0)
    assert smoothed.value == pytest.approx(5.0)
    for _ in range(200):
        smoothed.add(1.0)
    assert_close(smoothed.value, 1.0)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("best", [None, 1.0])
def test_a_score_that_is_not_finite_is_never_better(score: float | None, best: float | None) -> None:
    assert not is_better(score, best) and is_better(0.5, best)


def test_a_score_is_better_if_it_is_lower() -> None:
    assert [is_better(score, 1.0) for score in (0.9, 1.0, 1.1)] == [True, False, False]


@pytest.mark.parametrize(
    ("metric", "greater", "score"),
    [(None, None, 2.0), ("loss", None, 2.0), ("eval_accuracy", None, -0.5), ("accuracy", False, 0.5)],
)
def test_the_score_of_a_metric_is_lower_if_it_is_better(metric: str | None, greater: bool | None, score: float) -> None:
    arguments = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater)
    reported = {"eval_loss": 2.0, "eval_accuracy": 0.5, "eval_text": "x", "eval_none": None}
    assert score_of(arguments, reported) == score
    arguments.metric_for_best_model = "text"
    assert score_of(arguments, reported) is None
    arguments.metric_for_best_model = "none"
    assert math.isnan(score_of(arguments, reported) or 0.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_member_of_a_sweep_whose_loss_is_not_finite_is_last(loss: float) -> None:
    worse, unmeasured = (MemberState("b", "finished", 3, eval_loss=9.0), MemberState("c", "finished", 3))
    assert min((MemberState("a", "finished", 3, eval_loss=loss), worse), key=lambda one: one.rank) is worse
    assert min((MemberState("a", "finished", 3, smoothed_loss=loss), worse), key=lambda one: one.rank) is worse
    trained = dataclasses.replace(unmeasured, smoothed_loss=5.0)
    assert min((MemberState("a", "finished", 3, eval_loss=loss), trained), key=lambda one: one.rank) is trained
