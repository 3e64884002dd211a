"""Blocks: the content to show, as plain data. Results and states describe themselves with blocks instead of HTML.

    Card     a frame with a title
    Line     a line of text; ``Text`` is a span of it with a tone
    Table, Bar, BarChart, BarTable, Columns, Commands, Grid, HeatMap, Histogram, Tokens, Figures, Progress, LossChart,
    SmallCharts, CurveChart, Details, Stack

``nbpeft.display.html`` renders them for a notebook, ``nbpeft.display.text`` for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nbpeft.display.numbers import percent, plural
from nbpeft.state import Curve, MemoryPart, TrainState

Tone = Literal["", "bold", "dim", "accent", "success", "error", "warning", "code"]
Wrap = Literal["", "names", "never", "words", "cut", "as is"]


@dataclass(frozen=True)
class Text:
    """A span of text.

    Attributes:
        text: plain text.
        tone: its emphasis or colour.
        tooltip: further text, shown on hover.
        wrap: ``names``: may wrap after underscores and slashes; ``never``; ``words``: as ``names``, and between words
            also in a column of figures; ``cut``: an ellipsis in the middle if there is not enough room; ``as is``:
            line breaks are kept.
        href: URL that it links to.
        curve: index of a curve in a chart; a swatch of its colour is shown before the text.
    """

    text: str
    tone: Tone = ""
    tooltip: str = ""
    wrap: Wrap = ""
    href: str = ""
    curve: int | None = None


@dataclass(frozen=True)
class Spark(Text):
    """A curve as large as a word; ``text`` describes it.

    Attributes:
        points: the values by step.
    """

    points: Curve = ()


@dataclass(frozen=True)
class Pill(Text):
    """A status of one or two words in a rounded frame of its tone."""


Span = str | Text
Cell = Span | tuple[Span, ...]
"""A cell of a table; further spans are shown below the first one in a smaller font."""


def bold(text: str) -> Text:
    """Returns bold text."""
    return Text(text, "bold")


def dim(text: str) -> Text:
    """Returns dimmed text, for secondary information."""
    return Text(text, "dim")


@dataclass(frozen=True)
class Line:
    """A line of text; not shown if all spans are empty."""

    spans: tuple[Span, ...]


def line(*spans: Span) -> Line:
    """Returns a line of text."""
    return Line(spans)


def notes(items: Iterable[str]) -> tuple[Line, ...]:
    """Returns notes for the user, one per line."""
    return tuple(line(Text(f"note: {item}", "warning")) for item in items)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: titles of the columns.
        rows: cells of each row.
        right: indices of columns with figures, which are right-aligned and never wrapped.
        marked: indices of rows that are highlighted at their left edge.
        first: width of the first column in percent; 0 for automatic.
        prose: indices of columns with sentences, which keep a readable width; the table scrolls then.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    marked: tuple[int, ...] = ()
    first: int = 0
    prose: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bar:
    """Parts of memory as one bar, with a legend.

    Attributes:
        parts: the parts from left to right; empty ones are left out.
        whole: number of bytes at the full width.
        end: memory of the device in bytes, marked below the bar; None for no mark.
        end_label: name of the device.
        note: text after the legend.
        thin: whether to draw a small bar.
    """

    parts: tuple[MemoryPart, ...]
    whole: int
    end: int | None = None
    end_label: str = ""
    note: str = ""
    thin: bool = False


@dataclass(frozen=True)
class Commands:
    """Commands to copy, each with what it does.

    Attributes:
        commands: (what it does, command).
    """

    commands: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Box:
    """One of several texts side by side.

    Attributes:
        title: title of the box.
        runs: (span of the text, whether it is marked as different).
        aside: text to the right of the title.
        ending: dimmed text after the text.
        tone: emphasis or colour of ``aside``.
    """

    title: str
    runs: tuple[tuple[str, bool], ...]
    aside: str = ""
    ending: str = ""
    tone: Tone = "dim"

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.runs) + self.ending

    @property
    def plain(self) -> str:
        """The whole text for a terminal, with differences in angle quotes: ``count: ‹13›``."""
        return "".join(_quoted(text) if marked else text for text, marked in self.runs) + self.ending


def _quoted(text: str) -> str:
    inner = text.strip()
    return text.replace(inner, f"‹{inner}›", 1) if inner else text


@dataclass(frozen=True)
class Columns:
    """Texts side by side, e.g. the answers to one prompt."""

    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class HeatMap:
    """A grid of cells that are darker for larger values.

    Attributes:
        rows: (label, cells); a cell is (value from 0 to 1, tooltip), or None if it is empty.
    """

    rows: tuple[tuple[str, tuple[tuple[float, str] | None, ...]], ...]


@dataclass(frozen=True)
class BarChart:
    """Shares as horizontal bars; rendered as an image, which remains in a saved notebook.

    Attributes:
        bars: (label, share from 0 to 1, figure at the right edge).
        figure: title of the figures.
        values: text after each bar, e.g. seconds; by default the share in percent.
        intervals: (low, high) of each bar, as shares from 0 to 1; empty for none.
    """

    bars: tuple[tuple[str, float, str], ...]
    figure: str = ""
    values: tuple[str, ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()

    def value(self, number: int) -> str:
        """Returns the text after a bar."""
        return self.values[number] if self.values else percent(self.bars[number][1])


@dataclass(frozen=True)
class BarTable:
    """Several figures of several items: a row per item and a column of bars per figure; rendered as an image.

    Attributes:
        labels: the items.
        columns: (title, bars); the bar of an item is (share from 0 to 1, figure as text).
    """

    labels: tuple[str, ...]
    columns: tuple[tuple[str, tuple[tuple[float, str], ...]], ...]


@dataclass(frozen=True)
class Grid:
    """Shares as a grid with the share in each cell, darker for larger shares; rendered as an image.

    Attributes:
        cells: ((row, column), share from 0 to 1).
    """

    cells: tuple[tuple[tuple[str, str], float], ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of the rows in order of first occurrence."""
        return tuple(dict.fromkeys(row for (row, _), _ in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels of the columns in order of first occurrence."""
        return tuple(dict.fromkeys(column for (_, column), _ in self.cells))


@dataclass(frozen=True)
class Histogram:
    """A histogram of sizes.

    Attributes:
        bins: (first size, last size, number of items) of each bin, without gaps, in ascending order.
        limit: a size to mark if it is the last one of a bin; bars beyond it have another colour.
        limit_label: label of the limit.
        size_noun: unit of the sizes, e.g. ``token``.
        noun: the items, e.g. ``row``.
    """

    bins: tuple[tuple[int, int, int], ...]
    limit: int | None = None
    limit_label: str = ""
    size_noun: str = "token"
    noun: str = "row"

    @property
    def most(self) -> int:
        """Number of items in the fullest bin, at least 1."""
        return max([1, *(number for *_, number in self.bins)])

    @property
    def caption(self) -> str:
        """Description of the axes."""
        return f"{self.size_noun}s per {self.noun}, the tallest bar is {plural(self.most, self.noun)}"


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one kind.

    Attributes:
        text: their text.
        learned: whether they have labels, i.e. contribute to the loss.
        special: whether they are special tokens of the tokenizer.
        cut: whether they are beyond the maximum length, and not read at all.
        compared: whether they have labels in a rejected completion, with which the learned one is compared.
        skipped: number of tokens that are not shown here; the span has no text then.
    """

    text: str
    learned: bool = False
    special: bool = False
    cut: bool = False
    compared: bool = False
    skipped: int = 0


@dataclass(frozen=True)
class Tokens:
    """Text as a model reads it.

    Attributes:
        title: title above the text.
        spans: the text.
        framed: whether to draw a frame.
    """

    title: str
    spans: tuple[TokenSpan, ...]
    framed: bool = True


@dataclass(frozen=True)
class Figure:
    """A prominent figure.

    Attributes:
        label: label above it.
        figure: the number.
        note: dimmed text below it.
        width: minimum width in pixels.
        tooltip: further text, shown on hover.
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
    """A progress bar.

    Attributes:
        done: share from 0 to 1.
        failed: whether to draw it in the colour of an error.
    """

    done: float
    failed: bool = False


@dataclass(frozen=True)
class LossChart:
    """The loss curve of a run; once the run has ended, an image, which remains in a saved notebook."""

    train: TrainState


LabelledCurves = tuple[str, Curve, Curve]
"""Label, losses and evaluation losses of one run."""


@dataclass(frozen=True)
class CurveChart:
    """The loss curves of several runs in one chart, or those of a metric; an image once all of them have ended.

    Attributes:
        curves: the curves of each run.
        legend: whether to show a legend below the chart.
        live: whether more points will follow.
        metric: name of the metric, which is shown above; empty for losses.
    """

    curves: tuple[LabelledCurves, ...]
    legend: bool = True
    live: bool = False
    metric: str = ""


@dataclass(frozen=True)
class SmallCharts:
    """Further values of a run over time, each as a small curve; rendered like the loss curve."""

    train: TrainState


@dataclass(frozen=True)
class Details:
    """A block that is folded below its summary and opens on a click.

    Attributes:
        summary: the line that is always shown.
        block: the block.
        group: of the blocks of one group, at most one is open; empty for none.
    """

    summary: str
    block: Block
    group: str = ""


@dataclass(frozen=True)
class Stack:
    """Blocks one below the other."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Card:
    """A frame around blocks.

    Attributes:
        title: title of the card.
        blocks: its content; None is skipped.
        aside: text to the right of the title.
        wide: whether it takes the whole width of the page, for a table with many columns.
    """

    title: str
    blocks: tuple[Block | tuple[Block, ...] | None, ...] = ()
    aside: str | tuple[Span, ...] = ""
    wide: bool = False


Block = (
    Line
    | Table
    | Bar
    | BarChart
    | BarTable
    | Columns
    | Commands
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
    """Returns a frame around blocks.

    Args:
        title: title of the card.
        *blocks: its content; None is skipped.
        aside: text to the right of the title.
    """
    return Card(title, blocks, aside)
