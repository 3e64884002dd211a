"""The values of a chart under the mouse, without a script: columns in front of it, of which the style sheet shows one.

A column is an empty element with its text in an attribute. Where a sanitizer removes style sheets, nothing is seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from nbpeft.display import palette
from nbpeft.display.quoting import escape

Point = tuple[float, float]


class ShownCurve(NamedTuple):
    """A curve whose values are shown under the mouse.

    Attributes:
        name: its name.
        points: its points with ascending x.
        written: the format of its values.
        sustained: whether a value is shown until the next one, not only in its own column: the points of a learning
            rate may be further apart than those of the losses.
    """

    name: str
    points: Sequence[Point]
    written: Callable[[float], str]
    sustained: bool = False


MOST = 100
"""Most columns of a chart."""


@dataclass(frozen=True)
class Column:
    """A column of a chart.

    Attributes:
        share: its share of the chart's width, from 0 to 1.
        place: place of the crosshair in the column, from 0 to 1.
        on_right: whether there is more room for the text to the left of the crosshair.
        text: the values, one per line; empty for a column without.
    """

    share: float
    place: float
    on_right: bool
    text: str


def columns(curves: Sequence[ShownCurve], steps: Iterable[float], begin: float, end: float) -> list[Column]:
    """Returns a column around each step; with many steps, around some of them and always around the last.

    Args:
        curves: the curves, whose values at each step the column shows.
        steps: the steps with values.
        begin: step at the left edge of the chart.
        end: step at its right edge.
    """
    shown = sorted(set(steps))
    stride = -(-len(shown) // MOST) or 1
    shown = shown[::-1][::stride][::-1]
    width = end - begin
    if not shown or width <= 0:
        return []
    widest = max((after - before for before, after in pairwise(shown)), default=0)
    reach = max(widest / 2, width / 200)  # of the first and the last column to the outside
    edges = [max(begin, shown[0] - reach), *map(fmean, pairwise(shown)), min(end, shown[-1] + reach)]
    made = [Column((edges[0] - begin) / width, 0.0, False, "")]
    for previous, step, left, right in zip([begin - 1, *shown], shown, edges, edges[1:], strict=False):
        place = (step - left) / (right - left) if right > left else 0.5
        made.append(Column((right - left) / width, place, step > begin + width / 2, _text(curves, previous, step)))
    return [*made, Column((end - edges[-1]) / width, 0.0, False, "")]


def _text(curves: Sequence[ShownCurve], previous: float, step: float) -> str:
    """Returns the last values of the curves after the previous column (of sustained ones: at all), up to a step."""
    lines = [f"step {step:,.0f}"]
    for name, points, written, sustained in curves:
        place = bisect_right(points, step, key=lambda point: point[0]) - 1
        if place >= 0 and (sustained or points[place][0] > previous):
            lines.append(f"{name} {written(points[place][1])}")
    return "\n".join(lines)


def with_crosshair(chart: str, shown: Sequence[Column], left: float, right: float, top: int, bottom: int) -> str:
    """Returns a chart with its columns in front of it, in the same cell of a CSS grid.

    If a sanitizer drops the grid, the columns have no height.

    Args:
        chart: the chart as HTML.
        shown: its columns.
        left: space to the left of its curves in percent of its width.
        right: space to the right of its curves in percent of its width.
        top: space above its curves in pixels.
        bottom: space below its curves in pixels.
    """
    strips = "".join(
        f'<div class="nbpeft-at{" nbpeft-at-end" if column.on_right else ""}" data-at="{escape(column.text)}" '
        f'style="flex:{column.share:.4f} 1 0;--at:{100 * column.place:.0f}%"></div>'
        if column.text
        else f'<div style="flex:{column.share:.4f} 1 0"></div>'
        for column in shown
    )
    return (
        f'<style>{style_rules(top, bottom)}</style><div style="display:grid">'
        f'<div style="grid-area:1/1">{chart}</div>'
        f'<div aria-hidden="true" style="grid-area:1/1;display:flex;margin:0 {right:g}% 0 {left:g}%">{strips}</div>'
        "</div>"
    )


def style_rules(top: int, bottom: int) -> str:
    """Returns the style rules that show the column under the mouse; see ``with_crosshair``."""
    return (
        ".nbpeft-at{position:relative}"
        f'.nbpeft-at:hover::before{{content:"";position:absolute;left:var(--at);top:{top}px;bottom:{bottom}px;'
        f"border-left:1px solid {palette.DIM}}}"
        f".nbpeft-at:hover::after{{content:attr(data-at);position:absolute;z-index:1;top:{top}px;"
        f"left:calc(var(--at) + 8px);white-space:pre;pointer-events:none;padding:3px 7px;border-radius:4px;"
        f"font-size:11px;line-height:1.45;border:1px solid {palette.BORDER};color:{palette.TEXT};"
        f"background:{palette.TOOLTIP}}}"
        ".nbpeft-at-end:hover::after{left:auto;right:calc(100% - var(--at) + 8px)}"
    )
