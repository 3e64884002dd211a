"""Loss curves: few points, finite coordinates, and a picture that stands alone."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import strategies as st

from nbpeft.display import charts
from nbpeft.display.blocks import LossChart
from nbpeft.display.crosshair import MOST
from nbpeft.display.html import to_html
from tests.display.test_states import Reader
from tests.untimed import given
from tests.widgets.fakes import train_state

NAMESPACE = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")]


def test_few_points_are_kept_as_they_are() -> None:
    points = [(float(step), float(step)) for step in range(100)]
    assert charts.decimate(points) == points


def test_many_points_are_bounded_and_spikes_survive() -> None:
    points = [(float(step), 1.0) for step in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    points[7] = (7.0, -3.0)
    kept = charts.decimate(points, buckets=100)
    assert len(kept) <= 200
    assert (31_234.0, 9.0) in kept
    assert (7.0, -3.0) in kept
    assert kept == sorted(kept)


def assert_close(found: Sequence[tuple[float, float]], wanted: Sequence[tuple[float, float]]) -> None:
    assert [x for x, _ in found] == [x for x, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


@pytest.mark.parametrize("count", [1, 2, 3, 10, 40, 480])
def test_smoothing_does_not_lag_behind(count: int) -> None:
    """A loss that falls evenly on its axis is its own smoothed curve, also at both ends."""
    falling = [(7.0 * number, 5.0 - number / count) for number in range(count)]
    assert_close(charts.smooth(falling), falling)
    decaying = [(x, 10.0 ** (value - 5)) for x, value in falling]
    assert_close(charts.smooth(decaying, logarithmic=True), decaying)


def test_smoothing_removes_noise() -> None:
    noisy = [(float(number), 1.0 + 0.1 * (-1) ** number) for number in range(200)]
    assert max(abs(value - 1.0) for _, value in charts.smooth(noisy)[12:-12]) < 0.01
    assert [x for x, _ in charts.smooth(noisy)] == [x for x, _ in noisy]


def test_on_a_logarithmic_axis_the_logarithms_are_smoothed() -> None:
    history = tuple((number, 10.0 ** (-number / 10)) for number in range(1, 41))
    state = train_state(40, 40, history=history, eval_history=(), smoothed_loss=9.9)
    assert charts.is_logarithmic(state)
    smoothed, raw = re.findall(r'<path d="M([^"]*)"', charts.loss_chart(state))
    assert smoothed == raw, "both are straight lines"


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(0, 1e6, allow_nan=False),
    st.integers(2, 8),
)
def test_ticks_enclose_the_values_and_are_few(low: float, span: float, most: int) -> None:
    made = charts.ticks(low, low + span, most)
    step = made[1] - made[0]
    assert made[0] <= low + step * 1e-6
    assert made[-1] >= low + span - step * 1e-6
    assert 2 <= len(made) <= most + 2


def test_ticks_are_round() -> None:
    assert charts.ticks(0, 2.3, 4) == [0, 1, 2, 3]
    assert charts.ticks(0, 0.9, 4) == pytest.approx([0, 0.5, 1.0])


def test_the_chart_names_its_axes() -> None:
    shown = texts(charts.loss_chart(train_state(25, 40)))
    assert "step" in shown
    assert {"0", "10", "20", "30", "40"} <= set(shown)


@pytest.mark.parametrize("step", [0, 1, 2, 500])
def test_every_coordinate_is_finite_and_inside(step: int) -> None:
    svg = charts.loss_chart(train_state(step, 500))
    for data in re.findall(r' d="([^"]*)"', svg):
        for number in re.findall(r"-?\d+\.?\d*", data):
            assert -1 <= float(number) <= charts.WIDTH + 1
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()


@pytest.mark.parametrize("first", [0, 100, 299])
def test_a_run_that_was_resumed_is_drawn_from_its_beginning(first: int) -> None:
    """Its history holds the curve until then, too."""
    state = train_state(300, 500, first_step=first)
    svg = charts.loss_chart(state)
    assert svg == charts.loss_chart(dataclasses.replace(state, first_step=0))
    assert min(map(float, re.findall(r"-?\d+\.?\d*", " ".join(re.findall(r' d="([^"]*)"', svg))))) >= -1
    small = charts.small_chart(state.history, state)
    assert small == charts.small_chart(state.history, dataclasses.replace(state, first_step=0))
    assert charts.loss_columns(state) == charts.loss_columns(dataclasses.replace(state, first_step=0))


def test_a_learning_rate_is_shown_until_the_next_one() -> None:
    """A long run stores fewer of its points than of its losses."""
    state = train_state(25, 40, series={"learning rate": ((8, 1e-3), (16, 5e-4))})
    shown = [column.text for column in charts.loss_columns(state) if column.text]
    assert ["learning rate" in text for text in shown] == [False] * 7 + [True] * 18
    assert "learning rate 1e-3" in shown[14] and "learning rate 5e-4" in shown[-1]


@pytest.mark.parametrize("status", ["running", "paused", "finished"])
def test_the_values_of_each_step_are_under_the_mouse(status: Any) -> None:
    state = train_state(25, 40, status=status, series={"learning rate": ((24, 1e-3), (25, 5e-4))})
    before, *shown, after = charts.loss_columns(state)
    assert [column.text.partition("\n")[0] for column in shown] == [f"step {step}" for step in range(1, 26)]
    assert shown[-1].text.split("\n")[1].startswith("loss 0.1") and "learning rate 5e-4" in shown[-1].text
    assert "eval loss 0.102" not in shown[-1].text and "eval loss" in shown[19].text
    assert sum(column.share for column in (before, *shown, after)) == pytest.approx(1)
    assert before.text == after.text == ""
    end, left = (40 if status != "finished" else 25), before.share
    for step, column in enumerate(shown, 1):  # the crosshair is where the step is drawn
        assert left + column.place * column.share == pytest.approx(step / end)
        left += column.share
        assert column.on_right == (step > end / 2)
    page = to_html(LossChart(state))
    assert page.count("data-at=") == 25 and ".nbpeft-at:hover::after{content:attr(data-at)" in page
    assert Reader(page).text.count("loss") == 2, "the values are in attributes: without the style sheet nothing is seen"


def test_a_long_run_has_few_columns_and_the_last_step_among_them() -> None:
    shown = [column for column in charts.loss_columns(train_state(480, 500)) if column.text]
    assert 50 <= len(shown) <= MOST and shown[-1].text.startswith("step 480")
    assert [column.text for column in charts.loss_columns(train_state(0, 500)) if column.text] == []


def test_losses_that_are_not_finite_are_left_out() -> None:
    state = train_state(3, 3, history=((1, 2.0), (2, math.nan), (3, math.inf)), smoothed_loss=math.nan)
    svg = charts.loss_chart(state)
    assert "nan" not in svg.lower()
    assert svg.count("<circle") == 1


def test_a_chart_without_points_says_that_it_waits() -> None:
    assert "waiting for the first loss" in texts(charts.loss_chart(train_state(0)))
    assert charts.describe(train_state(0)) == "waiting for the first loss"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "failed", "step": 0}, "no step was finished"),
        ({"status": "finished", "step": 3}, "no loss was logged"),
        ({"status": "paused", "step": 1}, "no loss was logged yet"),
        ({"loss": math.nan}, "the loss is not a finite number"),
        ({"history": ((1, math.nan), (2, math.inf))}, "the loss is not a finite number"),
    ],
)
def test_a_chart_without_points_says_why(changes: dict[str, Any], words: str) -> None:
    state = dataclasses.replace(train_state(0), eval_history=(), **changes)
    assert words in texts(charts.loss_chart(state))
    assert charts.describe(state) == words


@pytest.mark.parametrize("scale", [1e-9, 3.4e12])
def test_labels_of_very_small_and_large_losses_have_room(scale: float) -> None:
    history = tuple((number, scale * (1 + number % 3 / 10)) for number in range(1, 9))
    shown = texts(charts.loss_chart(train_state(8, 8, history=history, smoothed_loss=scale, eval_history=())))
    upwards = [text for text in shown if "e" in text and text != "step"]
    assert len(upwards) == len(set(upwards)) >= 3
    assert max(map(len, upwards)) <= 7


def test_a_file_keeps_its_proportions_and_a_page_its_height() -> None:
    assert f'viewBox="0 0 {charts.WIDTH} {charts.HEIGHT}"' in charts.loss_chart(train_state(), fluid=False)
    page = ElementTree.fromstring(charts.loss_chart(train_state()))
    assert (page.get("width"), page.get("height"), page.get("viewBox")) == ("100%", str(charts.HEIGHT), None)


def test_equal_losses_are_drawn() -> None:
    svg = charts.loss_chart(train_state(2, 2, history=((1, 0.0), (2, 0.0)), smoothed_loss=0.0, eval_history=()))
    assert svg.count("<path") == 2


def test_tick_labels_tell_neighbours_apart() -> None:
    shown = texts(charts.loss_chart(train_state(2, 2, history=((1, 0.01001), (2, 0.01002)), eval_history=())))
    upwards = [text for text in shown if text.startswith("0.0")]
    assert len(upwards) == len(set(upwards)) >= 3


def test_a_long_run_stays_small() -> None:
    state = train_state(480, 100_000)
    assert len(charts.loss_chart(state)) < 25_000


def test_the_image_is_a_picture_of_its_own() -> None:
    image = charts.loss_image(train_state())
    found = re.fullmatch(r'<img src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)" .*>', image)
    assert found
    svg = base64.b64decode(found[1]).decode()
    assert ElementTree.fromstring(svg).tag == f"{NAMESPACE}svg"
    assert "var(" not in svg  # an image sees no theme
    assert 'alt="training loss' in image


def test_a_step_beyond_the_total_stays_in_the_picture() -> None:
    assert "50" in texts(charts.loss_chart(train_state(50, 40)))


def test_a_run_that_ended_early_fills_the_picture() -> None:
    running, stopped = (
        texts(charts.loss_chart(train_state(30, 600, status=status))) for status in ("running", "stopped")
    )
    assert "600" in running
    assert "600" not in stopped and "30" in stopped
