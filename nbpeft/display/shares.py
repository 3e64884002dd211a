"""Draws shares as images: horizontal bars, a table of bars, and a grid.

They are self-contained images, which remain when a notebook is saved, reopened or not trusted, in colours that are
readable on light and on dark backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from nbpeft.display.blocks import BarChart, BarTable, Grid
from nbpeft.display.charts import image
from nbpeft.display.numbers import percent
from nbpeft.display.quoting import escape
from nbpeft.errors import cut

_WIDTH = 640
_BLUE, _ORANGE, _GREY, _TRACK = "#2b88e0", "#f58518", "#808080", "rgba(128,128,128,.18)"
_LIGHT, _DARK = (232, 240, 249), (24, 88, 164)
"""Red, green and blue of the cells for 0 and for 1."""
_EQUAL_CONTRAST = math.sqrt(1.05 * 0.05) - 0.05
"""The luminance on which black and white text have the same contrast."""
_ROW, _BAR = 34, 18
_TALL_ROW = 44
_LETTER = 7.4
"""Approximate width in pixels of a character in 13px text."""
_LONGEST = 26


def bar_image(chart: BarChart) -> str:
    """Returns a bar chart as an ``<img>``: label, bar, share or value, and a figure at the right edge."""
    left = 20 + _LETTER * min(max((len(label) for label, _, _ in chart.bars), default=0), _LONGEST)
    right = _WIDTH - (max([len(chart.figure), *(len(figure) for _, _, figure in chart.bars)]) * _LETTER + 8)
    whole = right - left - 60
    top = 24 if chart.figure else 2
    parts = [_text(_WIDTH, 14, chart.figure, "end")] if chart.figure else []
    for number, (label, share, figure) in enumerate(chart.bars):
        middle = top + number * _ROW + _ROW / 2
        parts += [
            _text(left - 10, middle + 4.5, _cut(label), "end"),
            *_bar(left, middle - _BAR / 2, whole, share, _BAR),
            *(_whisker(left, whole, middle, *chart.intervals[number]) if chart.intervals else ()),
            _text(left + whole + 8, middle + 4.5, chart.value(number), weight=600),
            _text(_WIDTH, middle + 4.5, figure, "end"),
        ]
    return _image(parts, _WIDTH, int(top + _ROW * len(chart.bars) + 2), describe_bars(chart))


def _bar(x: float, y: float, width: float, share: float, height: int) -> tuple[str, str]:
    """Returns a track of a width, and a bar over its share of it."""
    wide = max(width * share, 2)
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height}" rx="3" fill="{_TRACK}"/>',
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.1f}" height="{height}" rx="3" fill="{_BLUE}"/>',
    )


def _whisker(left: float, whole: float, middle: float, low: float, high: float) -> tuple[str, ...]:
    """Returns an interval over a bar: a line with a stroke at each end."""
    first, last = left + whole * low, left + whole * high
    lines = ((first, middle, last, middle), *((x, middle - 5, x, middle + 5) for x in (first, last)))
    return tuple(
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_ORANGE}" stroke-width="2"/>'
        for x1, y1, x2, y2 in lines
    )


def bar_table_image(table: BarTable) -> str:
    """Returns a table of bars as an ``<img>``: label, and for each column a bar with its figure above it."""
    left = 10 + _LETTER * min(max(map(len, table.labels), default=0), _LONGEST)
    wide = (_WIDTH - left) / max(len(table.columns), 1) - 16
    parts = []
    for number, label in enumerate(table.labels):
        middle = 24 + number * _TALL_ROW + _TALL_ROW / 2
        parts.append(_text(left - 10, middle + 4.5, _cut(label), "end"))
        for place, (_, bars) in enumerate(table.columns):
            share, words = bars[number]
            x = left + place * (wide + 16)
            parts += [
                _text(x, middle - 1, words, weight=600),
                *_bar(x, middle + 5, wide, share, 8),
            ]
    heads = [_text(left + place * (wide + 16), 14, title) for place, (title, _) in enumerate(table.columns)]
    return _image([*heads, *parts], _WIDTH, 28 + _TALL_ROW * len(table.labels), describe_bar_table(table))


def describe_bar_table(table: BarTable) -> str:
    """Returns a description of a table of bars for screen readers."""
    return "; ".join(
        f"{label}: {', '.join(f'{bars[number][1]} {title}' for title, bars in table.columns)}"
        for number, label in enumerate(table.labels)
    )


def grid_image(grid: Grid) -> str:
    """Returns a grid as an ``<img>``; cells are darker for larger shares."""
    shares = dict(grid.cells)
    left = 12 + _LETTER * min(max(map(len, grid.rows), default=0), _LONGEST)
    cell = max(86.0, 16 + _LETTER * min(max(map(len, grid.columns), default=0), _LONGEST))
    parts = [_text(left + (n + 0.5) * cell, 16, _cut(name), "middle") for n, name in enumerate(grid.columns)]
    for number, row in enumerate(grid.rows):
        y = 26 + number * _ROW
        parts.append(_text(left - 12, y + _ROW / 2 + 4.5, _cut(row), "end"))
        for place, column in enumerate(grid.columns):
            share = shares.get((row, column))
            x = left + place * cell
            fill, colour = (_TRACK, _GREY) if share is None else _shade(share)
            words = "–" if share is None else percent(share)
            parts += [
                f'<rect x="{x + 1:.0f}" y="{y + 1}" width="{cell - 2:.0f}" height="{_ROW - 2}" rx="3" fill="{fill}"/>',
                _text(x + cell / 2, y + _ROW / 2 + 4.5, words, "middle", colour, 600),
            ]
    size = left + cell * len(grid.columns) + 2, 28 + _ROW * len(grid.rows)
    return _image(parts, int(size[0]), int(size[1]), describe_grid(grid))


def _shade(share: float) -> tuple[str, str]:
    """Returns the colour of a cell and that of its text; they have a contrast of at least 4.5 to 1 (WCAG 2.2, AA)."""
    red, green, blue = (round(light + (dark - light) * share) for light, dark in zip(_LIGHT, _DARK, strict=True))
    linear = [((value / 255 + 0.055) / 1.055) ** 2.4 for value in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return f"rgb({red},{green},{blue})", "#000" if luminance > _EQUAL_CONTRAST else "#fff"


def describe_bars(chart: BarChart) -> str:
    """Returns a description of a bar chart for screen readers."""
    return ", ".join(f"{label} {chart.value(number)}" for number, (label, _, _) in enumerate(chart.bars))


def describe_grid(grid: Grid) -> str:
    """Returns a description of a grid for screen readers."""
    return ", ".join(f"{row}, {column} {percent(share)}" for (row, column), share in grid.cells)


def _cut(label: str) -> str:
    return cut(label, _LONGEST)


def _text(x: float, y: float, words: str, anchor: str = "start", colour: str = _GREY, weight: int = 400) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.0f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _image(parts: Iterable[str], width: int, height: int, words: str) -> str:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, \'DejaVu Sans\', sans-serif" font-size="13">{"".join(parts)}</svg>'
    )
    return image(svg, width, height, f"display:block;width:100%;max-width:{width}px;height:auto;margin:8px 0 0", words)
