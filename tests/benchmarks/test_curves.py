"""The curves still run, at toy size."""

from __future__ import annotations

import math

import pytest

from tests.benchmarks.curves import COUNTS, CURVES, Curve, as_markdown, points
from tests.benchmarks.harness import TOY


@pytest.mark.drawn(4)
@pytest.mark.parametrize("curve", [pytest.param(curve, id=f"{curve.name}-{curve.axis}") for curve in CURVES])
def test_every_curve_runs_on_both_sides(curve: Curve) -> None:
    results = points(curve, (1, 3), repeats=0, fixed=TOY)
    assert [result.problem for result in results] == ["", ""]
    assert all(result.ours >= 0 and result.rival > 0 for result in results)


def test_a_point_has_its_number_of_things() -> None:
    for curve in CURVES:
        sizes = [curve.size(count) for count in COUNTS[curve.axis]]
        grows = [size.adapters if curve.axis == "adapters" else size.modules for size in sizes]
        assert tuple(grows) == COUNTS[curve.axis]


def test_the_table_has_a_line_for_each_curve_and_a_block_for_each_axis() -> None:
    curves = [CURVES[0], CURVES[1]]
    text = as_markdown([(curve, (1, 3), points(curve, (1, 3), repeats=0, fixed=TOY)) for curve in curves])
    assert "| number of adapters | 1 | 3 |" in text and "| number of modules | 1 | 3 |" in text
    assert text.count(curves[0].title) == 2 and str(math.nan) not in text
