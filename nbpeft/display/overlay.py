"""The loss curves of several runs in one picture: an image, which stays in a saved notebook."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from nbpeft.display import palette
from nbpeft.display.blocks import LabelledCurves
from nbpeft.display.charts import decimate, ticks

Point = tuple[float, float]

WIDTH, HEIGHT = 900, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 10, 38
_TEXT, _GRID = "#808080", "rgba(128,128,128,.3)"
_COLOURS = (*(palette.PARTS[name] for name in list(palette.PARTS)[:7]), "#2b88e0")


def colour_of(place: int) -> str:
    """The colour of the curve at that place."""
    return _COLOURS[place % len(_COLOURS)]


def overlay_image(curves: Sequence[LabelledCurves]) -> str:
    """Curves over each other as an ``<img>`` that carries its picture in itself: losses as lines, evaluations dotted.

    Args:
        curves: label, losses and evaluation losses of each; pairs that are not finite are left out.
    """
    data = base64.b64encode(overlay_chart(curves).encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{data}" width="{WIDTH}" height="{HEIGHT}" '
        f'alt="{escape(describe(curves))}" style="display:block;width:100%;max-width:{WIDTH}px;height:auto;margin:0">'
    )


def overlay_chart(curves: Sequence[LabelledCurves]) -> str:
    """The same as an ``<svg>`` element."""
    lines = [(_finite(losses), _finite(evaluated)) for _, losses, evaluated in curves]
    points = [point for pair in lines for part in pair for point in part]
    across, upwards = _axes(points)
    right, (low, high) = max(across[-1], max((step for step, _ in points), default=1.0)), (upwards[0], upwards[-1])

    def place(step: float, value: float) -> Point:
        x = _LEFT + step / right * (WIDTH - _LEFT - _RIGHT)
        return x, HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in upwards:
        y = place(0, tick)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" fill="none" stroke="{_GRID}"/>')
        parts.append(_words(_LEFT - 8, y + 4, "end", f"{tick:.4g}"))
    for tick in across:
        x, anchor = place(tick, low)[0], "start" if tick == 0 else "end" if tick > 0.98 * right else "middle"
        parts.append(_words(x, HEIGHT - _BOTTOM + 16, anchor, f"{tick:,.0f}"))
    parts.append(_words((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, "middle", "step"))
    if not points:
        parts.append(_words((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT / 2 - 10, "middle", "no loss was noted"))
    for number, (losses, evaluated) in enumerate(lines):
        colour = colour_of(number)
        parts.append(_line([place(*point) for point in decimate(losses)], colour, "1.5", ""))
        parts.append(_line([place(*point) for point in evaluated], colour, "1.5", "5 4"))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in (place(*point) for point in (*evaluated, *(losses if len(losses) == 1 else ())))
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(describe(curves))}" '
        f"style=\"font:clamp(11px, calc(25px - 1.6vw), 17px) system-ui, 'DejaVu Sans', sans-serif;"
        f'font-variant-numeric:tabular-nums">{"".join(parts)}</svg>'
    )


def describe(curves: Sequence[LabelledCurves]) -> str:
    """What the picture shows, for those who cannot see it."""
    ends = [
        f"{label} {points[-1][1]:.4g} at step {points[-1][0]:g}"
        for label, losses, _ in curves
        if (points := _finite(losses))
    ]
    return f"training loss of {', '.join(ends)}" if ends else "no loss was noted"


def _axes(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    values = [value for _, value in points] or [0.0, 1.0]
    low, high = min(values), max(values)
    end = max([1.0, *(step for step, _ in points)])
    across = [tick for tick in ticks(0, end, 6) if tick <= end * (1 + 1e-9) and tick == int(tick)]
    return across, ticks(0.0 if 0 <= low < high / 2 else low, high, 5)


def _finite(points: Sequence[tuple[int, float]]) -> list[Point]:
    return [(float(step), value) for step, value in points if math.isfinite(value)]


def _words(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_TEXT}">{escape(text)}</text>'


def _line(points: Sequence[Point], colour: str, width: str, dashes: str) -> str:
    if len(points) < 2:
        return ""
    corners = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<path d="M{corners}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{dashed}/>'
    )
