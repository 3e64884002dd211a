"""Blocks as text for a terminal, drawn by rich."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from io import StringIO
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nbpeft.display import blocks
from nbpeft.display.memory import part_words
from nbpeft.display.numbers import size

_TONES = {"bold": "bold", "dim": "dim", "accent": "bold blue", "error": "red", "warning": "yellow"}
_WIDEST = 100_000
"""Columns that no line reaches: it is the terminal that breaks lines of plain text."""


def to_text(block: blocks.Block, width: int = 100) -> str:
    """A block as plain text."""
    return _printed(renderable(block), width)


def columns(rows: Sequence[Sequence[str]], *, indent: int = 2) -> str:
    """Rows as aligned plain text; a cell may have several lines."""
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return "\n".join(f"{' ' * indent}{row}" for row in _printed(grid, _WIDEST).split("\n")) if rows else ""


def _printed(item: RenderableType, width: int) -> str:
    # In a kernel rich would display what is printed, whatever the file.
    console = Console(
        file=StringIO(), width=width, color_system=None, force_jupyter=False, legacy_windows=False, emoji=False
    )
    console.print(item)
    return "\n".join(row.rstrip() for row in console.file.getvalue().rstrip("\n").split("\n"))  # type: ignore[attr-defined]


@singledispatch
def renderable(block: Any) -> RenderableType:
    """A block, or several, as rich draws it."""
    raise TypeError(f"no block: {block!r:.80}")


@renderable.register
def _(block: tuple) -> RenderableType:  # type: ignore[type-arg]
    return Group(*(renderable(part) for part in block if part is not None and part != blocks.line()))


@renderable.register
def _(block: blocks.Card) -> RenderableType:
    aside = Text(block.aside, style="dim") if block.aside else None
    return Panel(
        renderable(block.blocks), title=Text(block.title, style="bold"), title_align="left", subtitle=aside,
        subtitle_align="right", box=box.ROUNDED, expand=False,
    )  # fmt: skip


@renderable.register
def _(block: blocks.Stack) -> RenderableType:
    return renderable(block.blocks)


@renderable.register
def _(block: blocks.Line) -> RenderableType:
    return Text(" ").join(text for text in map(_span, block.spans) if text)


def _span(item: blocks.Span) -> Text:
    return Text(item) if isinstance(item, str) else Text(item.text, style=_TONES.get(item.tone, ""))


@renderable.register
def _(block: blocks.Table) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(block.head):
        right = place in block.right
        table.add_column(Text(title), justify="right" if right else "left", no_wrap=right)
    for place, row in enumerate(block.rows):
        cells = (Text("\n").join(map(_span, cell if isinstance(cell, tuple) else (cell,))) for cell in row)
        table.add_row(*cells, style="bold" if place in block.marked else "")
    return table


@renderable.register
def _(block: blocks.Bar) -> RenderableType:
    rows = [(part_words(part), part.byte_count) for part in block.parts if part.byte_count]
    table = Table.grid(padding=(0, 2))
    for words, byte_count in rows:
        table.add_row(ProgressBar(block.whole, byte_count, width=24), Text(words))
    end = Text(f"{block.end_label}: {size(block.end)}" if block.end is not None else "", style="dim")
    return Group(table, *(text for text in (end, Text(block.remark, style="dim")) if text))


@renderable.register
def _(block: blocks.Columns) -> RenderableType:
    return Columns(
        [
            Panel(
                Text("").join(Text(piece, style="reverse" if changed else "") for piece, changed in item.runs)
                + Text(item.ending, style="dim"),
                title=Text(item.title),
                subtitle=Text(item.aside) if item.aside else None,
                width=46,
            )
            for item in block.boxes
        ]
    )


@renderable.register
def _(block: blocks.HeatMap) -> RenderableType:
    shades = " ░▒▓█"
    grid = Table.grid(padding=(0, 1))
    for label, cells in block.rows:
        drawn = "".join(" " if cell is None else shades[min(int(cell[0] * 4.999), 4)] for cell in cells)
        grid.add_row(Text(label, justify="right"), Text(drawn))
    return grid


@renderable.register
def _(block: blocks.Figures) -> RenderableType:
    grid = Table.grid(padding=(0, 3))
    grid.add_row(*(Text(figure, style="bold") for figure, _, _ in block.figures))
    grid.add_row(*(Text(label, style="dim") for _, label, _ in block.figures))
    return grid


@renderable.register
def _(block: blocks.Progress) -> RenderableType:
    return ProgressBar(1.0, block.done, width=60, complete_style="red" if block.failed else "blue")


@renderable.register
def _(block: blocks.LossChart) -> RenderableType:
    from nbpeft.display.charts import describe

    return Text(describe(block.train), style="dim")


@renderable.register
def _(block: blocks.Details) -> RenderableType:
    return Group(Text(block.summary, style="dim"), renderable(block.block))
