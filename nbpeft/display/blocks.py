"""What is shown, as plain data: a result or a state describes itself with these, and knows no HTML.

    Card     a frame with a title
    Line     a line of text; ``Text`` is a stretch of it with a tone
    Table, Bar, Columns, HeatMap, Histogram, Tokens, Figures, Progress, LossChart, Details, Stack

``nbpeft.display.html`` draws them for a notebook, ``nbpeft.display.text`` for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nbpeft.display.numbers import plural
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
    """

    text: str
    tone: Tone = ""
    tooltip: str = ""
    wrap: Wrap = ""


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
    Line
    | Table
    | Bar
    | Columns
    | HeatMap
    | Histogram
    | Tokens
    | Figures
    | Progress
    | LossChart
    | Details
    | Stack
    | Card
)


def card(title: str, *blocks: Block | tuple[Block, ...] | None, aside: str = "") -> Card:
    """A frame around blocks; None is left out."""
    return Card(title, blocks, aside)
