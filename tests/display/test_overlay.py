"""Curves of several runs in one picture."""

from __future__ import annotations

import base64
import re
from xml.etree import ElementTree

import pytest

from nbpeft.display.blocks import CurveChart, LabelledCurves
from nbpeft.display.html import to_html
from nbpeft.display.overlay import colour_of, describe, overlay_chart, overlay_columns, overlay_image
from nbpeft.display.text import to_text

FIRST = ("sql-1", ((1, 4.0), (2, 3.0), (3, 2.0)), ((2, 3.5),))
SECOND = ("a <b>", ((1, 5.0), (2, float("nan")), (3, 1.0)), ())


def lines_of(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The corners of the lines of a colour."""
    tree = ElementTree.fromstring(svg)
    found = [
        path.get("d", "")[1:] for path in tree.iter("{http://www.w3.org/2000/svg}path") if path.get("stroke") == colour
    ]
    return [list(zip(*[iter(map(float, corners.split()))] * 2, strict=True)) for corners in found]


def test_each_run_has_a_line_of_its_own_in_one_frame() -> None:
    svg = overlay_chart([FIRST, SECOND])
    (first,), (second,) = lines_of(svg, colour_of(0)), lines_of(svg, colour_of(1))
    assert [x for x, _ in first][::2] == [x for x, _ in second]  # the same steps at the same places; no NaN
    assert second[0][1] < first[0][1] < first[1][1] < first[2][1] < second[1][1]  # 5 is above 4, and so on
    assert svg.count("<circle") == 1 and "stroke-dasharray" not in svg


def test_it_stays_in_a_saved_notebook_and_names_the_runs() -> None:
    page = to_html(CurveChart((FIRST, SECOND)))
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    ElementTree.fromstring(base64.b64decode(data))
    assert "sql-1" in page and "a &lt;b&gt;" in page and "a <b>" not in page and "eval loss" in page
    assert "eval loss" not in to_html(CurveChart((SECOND,)))


@pytest.mark.parametrize("curves", [[], [("sql-1", (), ())], [("sql-1", ((1, float("inf")),), ())]])
def test_without_numbers_it_says_so(curves: list[LabelledCurves]) -> None:
    assert "no loss was logged" in overlay_chart(curves) and overlay_image(curves)
    assert describe(curves) == "no loss was logged"


def test_a_terminal_reads_where_each_ends() -> None:
    assert to_text(CurveChart((FIRST, SECOND))) == "training loss of sql-1 2 at step 3, a <b> 1 at step 3"


def test_the_losses_of_all_runs_are_under_the_mouse() -> None:
    texts = [column.text for column in overlay_columns([FIRST, SECOND]) if column.text]
    assert texts == [
        "step 1\nsql-1 4\na <b> 5",
        "step 2\nsql-1 3\nsql-1 eval 3.5",
        "step 3\nsql-1 2\na <b> 1",
    ]
    for live in (False, True):
        page = to_html(CurveChart((FIRST, SECOND), live=live))
        assert page.count("data-at=") == 3 and "a &lt;b&gt; 5" in page


def test_a_run_of_one_step_is_drawn() -> None:
    assert overlay_chart([("sql-1", ((1, 0.5),), ())]).count("<circle") == 1
