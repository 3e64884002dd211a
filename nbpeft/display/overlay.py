"""The loss curves of several runs in one chart."""

from __future__ import annotations

from collections.abc import Sequence

from nbpeft.display import palette
from nbpeft.display.blocks import LabelledCurves
from nbpeft.display.charts import NEUTRAL, Frame, Picture, Point, across, decimate, finite, left_of, svg_text, ticks
from nbpeft.display.crosshair import Column, ShownCurve, columns

HEIGHT = 260
_COLOURS = (*(palette.PARTS[name] for name in list(palette.PARTS)[:7]), "#2b88e0")


def colour_of(place: int) -> str:
    """Returns the colour of the curve with an index."""
    return _COLOURS[place % len(_COLOURS)]


def overlay_image(curves: Sequence[LabelledCurves], metric: str = "") -> str:
    """Returns the curves in one chart, as a self-contained ``<img>``: losses as lines, evaluation losses dashed.

    Args:
        curves: (label, losses, evaluation losses) of each run; values that are not finite are left out.
        metric: name of the metric whose values are given instead of losses.
    """
    return _picture(curves, metric).image(NEUTRAL)


def overlay_chart(curves: Sequence[LabelledCurves], metric: str = "") -> str:
    """Returns the same chart as an ``<svg>`` element."""
    return _picture(curves, metric).svg(NEUTRAL)


def overlay_left(curves: Sequence[LabelledCurves]) -> float:
    """Returns the space to the left of the curves in percent of the chart's width."""
    return left_of(f"{tick:.4g}" for tick in _frame(curves).upwards)


def overlay_columns(curves: Sequence[LabelledCurves]) -> list[Column]:
    """Returns the columns of the chart, with the losses of all curves at a step each."""
    named = [
        ShownCurve(f"{label}{kind}", finite(points), "{:.4g}".format)
        for label, *kinds in curves
        for kind, points in zip(("", " eval"), kinds, strict=True)
    ]
    return columns(named, [step for curve in named for step, _ in curve.points], 0.0, _frame(curves).end)


def _frame(curves: Sequence[LabelledCurves]) -> Frame:
    """Returns the axes, which include all points."""
    points = [point for _, *kinds in curves for part in kinds for point in finite(part)]
    values = [value for _, value in points] or [0.0, 1.0]
    low, high = min(values), max(values)
    end = max([1.0, *(step for step, _ in points)])
    steps = [tick for tick in ticks(0, end, 6) if tick <= end * (1 + 1e-9) and tick == int(tick)]
    upwards = ticks(0.0 if 0 <= low < high / 2 else low, high, 5)
    right = max(steps[-1], max((step for step, _ in points), default=1.0))
    return Frame(tuple(steps), tuple(upwards), 0.0, right, logarithmic=False, empty="", height=HEIGHT)


def _picture(curves: Sequence[LabelledCurves], metric: str) -> Picture:
    lines = [(finite(losses), finite(evaluated)) for _, losses, evaluated in curves]
    points = [point for pair in lines for part in pair for point in part]
    frame = _frame(curves)
    drawn, words = [], [frame.words()]
    if not points:
        words.append(svg_text("50%", HEIGHT / 2 - 10, "no loss was logged"))
    for number, (losses, evaluated) in enumerate(lines):
        colour = colour_of(number)
        drawn.append(_line(frame.place(decimate(losses)), colour, "1.5", ""))
        drawn.append(_line(frame.place(evaluated), colour, "1.5", "5 4"))
        words += [
            f'<circle cx="{across(x)}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in frame.place((*evaluated, *(losses if len(losses) == 1 else ())))
        ]
    levels = frame.levels("{:.4g}".format)
    return Picture(describe(curves, metric), levels, "".join(drawn), "".join(words), HEIGHT)


def describe(curves: Sequence[LabelledCurves], metric: str = "") -> str:
    """Returns a description of the chart for screen readers."""
    ends = [
        f"{label} {points[-1][1]:.4g} at step {points[-1][0]:g}"
        for label, losses, _ in curves
        if (points := finite(losses))
    ]
    return f"{metric or 'training loss'} of {', '.join(ends)}" if ends else "no loss was logged"


def _line(points: Sequence[Point], colour: str, width: str, dashes: str) -> str:
    if len(points) < 2:
        return ""
    corners = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<path d="M{corners}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{dashed} '
        f'vector-effect="non-scaling-stroke"/>'
    )
