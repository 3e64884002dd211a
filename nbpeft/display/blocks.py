"""What is shown, as plain data: a result or a state describes itself with these, and knows no HTML.

    Card     a frame with a title
    Line     a line of text; ``Text`` is a stretch of it with a tone
    Table, Bar, BarChart, Columns, Grid, HeatMap, Figures, Progress, LossChart, Details, Stack

``nbpeft.display.html`` draws them for a notebook, ``nbpeft.display.text`` for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nbpeft.state import MemoryPart, TrainState

Tone = Literal["", "bold", "dim", "accent", "error", "warning"]
Wrap = Literal["", "names", "never", "cut", "as is"]


@dataclass(frozen=True)
class Text:
    """A stretch of text.

    Attributes:
        text: plain text.
        tone: how it stands out, or back.
        tooltip: more about it, where the mouse rests.
        wrap: ``names``: may be broken behind underscores and slashes; ``never``; ``cut``: ends in an ellipsis where
            there is no room; ``as is``: keeps line breaks.
        href: address that it links to.
    """

    text: str
    tone: Tone = ""
    tooltip: str = ""
    wrap: Wrap = ""
    href: str = ""


Span = str | Text
Cell = Span | tuple[Span, ...]
"""Of a table; further spans stand below the first, smaller."""


def bold(text: str) -> Text:
    """Text that is read first."""
    return Text(text, "bold")


def dim(text: str) -> Text:
    """Secondary text."""
    return Text(text, "dim")


@dataclass(frozen=True)
class Line:
    """A line of text; nothing where all of it is empty."""

    spans: tuple[Span, ...]


def line(*spans: Span) -> Line:
    """A line of text."""
    return Line(spans)


def notes(items: Iterable[str]) -> tuple[Line, ...]:
    """What a person should know, one a line."""
    return tuple(line(Text(f"note: {item}", "warning")) for item in items)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: titles of the columns.
        rows: their cells.
        right: columns with figures, which are aligned to the right and never broken into lines.
        marked: rows with the accent at their left edge.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bar:
    """Parts of memory as one bar, with a legend.

    Attributes:
        parts: from the left; empty ones are left out.
        whole: bytes that the full width stands for.
        end: where the device ends; drawn below the bar.
        end_label: what the device is.
        note: behind the legend.
    """

    parts: tuple[MemoryPart, ...]
    whole: int
    end: int | None = None
    end_label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Box:
    """One of several texts beside each other.

    Attributes:
        title: of the box.
        runs: stretches of the text, and whether each is marked as different.
        aside: on the right of the title.
        ending: behind the text, faintly.
    """

    title: str
    runs: tuple[tuple[str, bool], ...]
    aside: str = ""
    ending: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.runs) + self.ending


@dataclass(frozen=True)
class Columns:
    """Texts beside each other, e.g. the answers to one prompt."""

    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class HeatMap:
    """A grid of cells, darker where a value is larger.

    Attributes:
        rows: label, and a (value from 0 to 1, tooltip) for each cell; None where there is nothing.
    """

    rows: tuple[tuple[str, tuple[tuple[float, str] | None, ...]], ...]


@dataclass(frozen=True)
class BarChart:
    """Shares as bars below each other; an image, which stays in a saved notebook.

    Attributes:
        bars: label, share from 0 to 1, and a figure on the right of it.
        figure: what the figures are, above them.
    """

    bars: tuple[tuple[str, float, str], ...]
    figure: str = ""


@dataclass(frozen=True)
class Grid:
    """Shares as a grid with a figure in each cell, the higher the darker; an image, as a bar chart is.

    Attributes:
        cells: (row, column) and its share from 0 to 1.
    """

    cells: tuple[tuple[tuple[str, str], float], ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of the rows, in the order of the cells."""
        return tuple(dict.fromkeys(row for (row, _), _ in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels of the columns, in the order of the cells."""
        return tuple(dict.fromkeys(column for (_, column), _ in self.cells))


@dataclass(frozen=True)
class Figures:
    """Large figures with small labels: (figure, label, least width in pixels)."""

    figures: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Progress:
    """How much is done: a share from 0 to 1."""

    done: float
    failed: bool = False


@dataclass(frozen=True)
class LossChart:
    """The loss curve of a run; an image, which stays in a saved notebook, once the run has ended."""

    train: TrainState


@dataclass(frozen=True)
class Details:
    """A block that opens below its summary."""

    summary: str
    block: Block


@dataclass(frozen=True)
class Stack:
    """Cards below each other."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Card:
    """A frame around blocks.

    Attributes:
        title: what it is about.
        blocks: what is in it; None is left out.
        aside: on the right of the title.
    """

    title: str
    blocks: tuple[Block | tuple[Block, ...] | None, ...] = ()
    aside: str = ""


Block = (
    Line | Table | Bar | BarChart | Columns | Grid | HeatMap | Figures | Progress | LossChart | Details | Stack | Card
)


def card(title: str, *blocks: Block | tuple[Block, ...] | None, aside: str = "") -> Card:
    """A frame around blocks; None is left out."""
    return Card(title, blocks, aside)
