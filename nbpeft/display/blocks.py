"""What is shown, as plain data: a result or a state describes itself with these, and knows no HTML.

    Card     a frame with a title
    Line     a line of text; ``Text`` is a stretch of it with a tone
    Table, Bar, BarChart, BarTable, Columns, Grid, HeatMap, Histogram, Tokens, Figures, Progress, LossChart,
    SmallCharts, CurveChart, Details, Stack

``nbpeft.display.html`` draws them for a notebook, ``nbpeft.display.text`` for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nbpeft.display.numbers import percent, plural
from nbpeft.state import Curve, MemoryPart, TrainState

Tone = Literal["", "bold", "dim", "accent", "success", "error", "warning", "code"]
Wrap = Literal["", "names", "never", "cut", "as is"]


@dataclass(frozen=True)
class Text:
    """A stretch of text.

    Attributes:
        text: plain text.
        tone: how it stands out, or back.
        tooltip: more about it, where the mouse rests.
        wrap: ``names``: may be broken behind underscores and slashes; ``never``; ``cut``: an ellipsis in the middle
            where there is no room; ``as is``: keeps line breaks.
        href: address that it links to.
        curve: the place of a curve in a chart, whose colour stands before the text.
    """

    text: str
    tone: Tone = ""
    tooltip: str = ""
    wrap: Wrap = ""
    href: str = ""
    curve: int | None = None


@dataclass(frozen=True)
class Pill(Text):
    """A state in a word or two, on a background of its tone.

    Attributes:
        saved: what is true of it later, too: seen in its place where no style sheet of ``CURRENT`` is alive.
    """

    saved: str = ""


CURRENT, SAVED = "nbpeft-current", "nbpeft-saved"
"""CSS classes of what is seen while a state is followed, and of what a saved notebook shows in its place."""


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
    """Returns a line of text."""
    return Line(spans)


def notes(items: Iterable[str]) -> tuple[Line, ...]:
    """Returns what a person should know, one a line."""
    return tuple(line(Text(f"note: {item}", "warning")) for item in items)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: titles of the columns.
        rows: their cells.
        right: columns with figures, which are aligned to the right and never broken into lines.
        marked: rows with the accent at their left edge.
        first: percent of the width that the first column takes; 0 for what it needs.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    marked: tuple[int, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Bar:
    """Parts of memory as one bar, with a legend.

    Attributes:
        parts: from the left; empty ones are left out.
        whole: bytes that the full width stands for.
        end: where the device ends; drawn below the bar.
        end_label: what the device is.
        note: behind the legend.
        thin: a bar that takes little room.
    """

    parts: tuple[MemoryPart, ...]
    whole: int
    end: int | None = None
    end_label: str = ""
    note: str = ""
    thin: bool = False


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

    @property
    def plain(self) -> str:
        """All of it for a terminal, with what is different in signs: ``count: ‹13›``."""
        return "".join(_in_signs(text) if marked else text for text, marked in self.runs) + self.ending


def _in_signs(text: str) -> str:
    inner = text.strip()
    return text.replace(inner, f"‹{inner}›", 1) if inner else text


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
        values: what stands behind each bar in place of its share in percent, e.g. seconds.
    """

    bars: tuple[tuple[str, float, str], ...]
    figure: str = ""
    values: tuple[str, ...] = ()

    def value(self, number: int) -> str:
        """Returns what stands behind a bar."""
        return self.values[number] if self.values else percent(self.bars[number][1])


@dataclass(frozen=True)
class BarTable:
    """Several figures of several things, a row for each thing and a column of bars for each figure; an image.

    Attributes:
        labels: the things.
        columns: title, and a share from 0 to 1 and the figure in words for each thing.
    """

    labels: tuple[str, ...]
    columns: tuple[tuple[str, tuple[tuple[float, str], ...]], ...]


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
class Histogram:
    """How many things are how large.

    Attributes:
        bins: first and last size of each, and how many things are in it; neighbours, smallest first.
        limit: a size to mark, where it is the last one of a bin; what is beyond stands out.
        limit_label: what that is.
        size_noun: what sizes are counted in, e.g. ``token``.
        noun: what is counted, e.g. ``row``.
    """

    bins: tuple[tuple[int, int, int], ...]
    limit: int | None = None
    limit_label: str = ""
    size_noun: str = "token"
    noun: str = "row"

    @property
    def most(self) -> int:
        """How many things are in the fullest bin, and at least 1."""
        return max([1, *(number for *_, number in self.bins)])

    @property
    def caption(self) -> str:
        """What the axes are."""
        return f"{self.size_noun}s per {self.noun}, the tallest bar is {plural(self.most, self.noun)}"


@dataclass(frozen=True)
class TokenSpan:
    """Neighbouring tokens of one kind.

    Attributes:
        text: what they stand for.
        learned: whether a loss is taken on them.
        special: whether it is one of the tokenizer's special tokens.
        cut: whether they are beyond the maximal length, and not read at all.
        skipped: as many tokens are left out here, and there is no text.
    """

    text: str
    learned: bool = False
    special: bool = False
    cut: bool = False
    skipped: int = 0


@dataclass(frozen=True)
class Tokens:
    """Text as a model reads it.

    Attributes:
        title: above it.
        spans: the text.
        framed: whether it stands in a frame.
    """

    title: str
    spans: tuple[TokenSpan, ...]
    framed: bool = True


@dataclass(frozen=True)
class Figure:
    """A number that is read first.

    Attributes:
        label: above it.
        figure: the number.
        note: below it, faintly.
        width: least width in pixels.
        tooltip: more about it.
    """

    label: str
    figure: str
    note: str = ""
    width: int = 0
    tooltip: str = ""


@dataclass(frozen=True)
class Figures:
    """Large figures with small labels, in a row."""

    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Progress:
    """How much is done: a share from 0 to 1."""

    done: float
    failed: bool = False


@dataclass(frozen=True)
class LossChart:
    """The loss curve of a run; an image, which stays in a saved notebook, once the run has ended."""

    train: TrainState


LabelledCurves = tuple[str, Curve, Curve]
"""Label, losses and evaluation losses of one run."""


@dataclass(frozen=True)
class CurveChart:
    """The loss curves of several runs over each other; an image once none of them goes on.

    Attributes:
        curves: of the runs.
        legend: whether their labels stand below it.
        live: whether more points will come.
    """

    curves: tuple[LabelledCurves, ...]
    legend: bool = True
    live: bool = False


@dataclass(frozen=True)
class SmallCharts:
    """What else a run has measured over time, each as a small curve; images, as the loss curve."""

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
    aside: str | tuple[Span, ...] = ""


Block = (
    Line
    | Table
    | Bar
    | BarChart
    | BarTable
    | Columns
    | Grid
    | HeatMap
    | Histogram
    | Tokens
    | Figures
    | Progress
    | LossChart
    | SmallCharts
    | CurveChart
    | Details
    | Stack
    | Card
)


def card(title: str, *blocks: Block | tuple[Block, ...] | None, aside: str | tuple[Span, ...] = "") -> Card:
    """Returns a frame around blocks; None is left out."""
    return Card(title, blocks, aside)
