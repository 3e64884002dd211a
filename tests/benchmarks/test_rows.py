"""The benchmarks still run: every row at toy size, and those that are exact at full size."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.benchmarks import table
from tests.benchmarks.harness import FULL, OURS, PEFT, TOY, Measure, Result, Row, Size, measure, rows

ROWS = rows()
SLOW = {"load_ext", "import", "first-use", "sweep-peak", "sweep-short-peak", "sweep-time", "sweep-short-time"}
"""Rows that start interpreters or train several times; those that import another library's Trainer are slow, too."""


def named(row: Row) -> object:
    slow = row.name in SLOW or row.name.startswith(("training-nf4", "training-trl"))
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(row, id=row.name, marks=marks)


@pytest.mark.drawn(25)
@pytest.mark.parametrize("row", [named(row) for row in ROWS])
def test_every_row_runs_on_both_sides(row: Row) -> None:
    result = measure(row, TOY)
    assert result.problem == ""
    assert result.ours >= 0
    assert result.rival > 0
    assert row.title in table.as_text([result])
    assert row.title in table.as_markdown([result])
    assert table.as_dict(result)["name"] == row.name


@pytest.mark.drawn(1)
@pytest.mark.parametrize("row", [named(row) for row in ROWS if row.name.startswith("saved-")])
def test_bytes_are_within_their_target(row: Row) -> None:
    result = measure(row, dataclasses.replace(FULL, repeats=0))
    assert result.ratio <= row.target


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert [row.name for row in rows(["saved-fp32"])] == ["saved-fp32-dropout", "saved-fp32-recompute"]


def constant(**values: float) -> Row:
    def prepare(name: str, size: Size) -> Measure:
        return lambda: values[name]

    return Row("row", "a row", "seconds", 0.5, prepare)


def test_a_floor_is_taken_off_both_sides() -> None:
    row = constant(nbpeft=12.0, peft=14.0)
    assert Result(row, ours=12.0, rival=14.0, floor=10.0).ratio == 0.5
    assert Result(row, ours=12.0, rival=14.0, floor=10.0).met
    assert not Result(row, ours=12.0, rival=14.0).met
    assert math.isnan(Result(row, ours=12.0, rival=10.0, floor=10.0).ratio)


def test_an_absolute_target_looks_at_ours_alone() -> None:
    row = Row("row", "a row", "seconds", 0.15, constant().prepare, absolute=True)
    assert Result(row, ours=0.1, rival=0.01).met
    assert not Result(row, ours=0.2, rival=9.0).met


def test_what_we_cannot_do_is_a_result_and_what_peft_cannot_is_not() -> None:
    result = measure(constant(peft=1.0), TOY)
    assert result.problem == f"KeyError: '{OURS}'"
    assert result.met is None
    assert "KeyError" in table.as_text([result])
    with pytest.raises(KeyError, match=PEFT):
        measure(constant(nbpeft=1.0), TOY)


def test_sides_take_turns_and_the_median_counts() -> None:
    order: list[str] = []

    def prepare(name: str, size: Size) -> Measure:
        values = iter([5.0, 5.0, 1.0, 2.0, 9.0] if name == OURS else [5.0, 4.0, 4.0, 4.0])

        def once() -> float:
            order.append(name)
            return next(values)

        return once

    result = measure(Row("row", "a row", "seconds", 0.5, prepare, repeats=3))
    assert (result.ours, result.rival) == (2.0, 4.0)
    assert order[-6:] == [PEFT, OURS] * 3


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.0000032, "seconds", "3 µs"),
        (0.0032, "seconds", "3.2 ms"),
        (1.5, "seconds", "1.50 s"),
        (11_500_000, "bytes", "11.5 MB"),
        (math.nan, "bytes", "–"),
    ],
)
def test_quantities_read_well(value: float, kind: str, text: str) -> None:
    assert table.quantity(value, kind) == text
