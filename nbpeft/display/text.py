"""Renders blocks as text for a terminal, with rich."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from io import StringIO
from typing import Any

from nbpeft._util.optional import needs
from nbpeft.display import blocks
from nbpeft.display.memory import part_message
from nbpeft.display.numbers import NONE, percent, size
from nbpeft.errors import visible

with needs("rich", "A result as text"):
    from rich import box
    from rich.console import Console, Group, RenderableType
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

_TONES = {"bold": "bold", "dim": "dim", "accent": "bold blue", "success": "green", "error": "red", "warning": "yellow"}
_WIDEST = 100_000
"""A width in characters that no line reaches, so that rich does not wrap lines: the terminal does."""


def to_text(block: blocks.Block, width: int = 100) -> str:
    """Returns a block as plain text.

    Args:
        block: the block.
        width: width of a line in characters.
    """
    return _printed(renderable(block), width)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as aligned and indented plain text; a cell may have several lines."""
    return "\n".join(f"  {line}" for line in _printed(_grid(rows), _WIDEST).split("\n")) if rows else ""


def _printed(item: RenderableType, width: int) -> str:
    # Without force_jupyter=False rich displays its output in the notebook, even if it has a file.
    stream = StringIO()
    console = Console(file=stream, width=width, color_system=None, force_jupyter=False, legacy_windows=False)
    console.print(item)
    return visible("\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n")))


def _grid(rows: Sequence[Sequence[str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


@singledispatch
def renderable(block: Any) -> RenderableType:
    """Returns a block, or several, as a rich renderable."""
    raise TypeError(f"not a block: {block!r:.80}")


@renderable.register
def _(block: tuple) -> RenderableType:  # type: ignore[type-arg]
    return Group(*(renderable(part) for part in block if part not in (None, (), blocks.line())))


@renderable.register
def _(block: blocks.Card) -> RenderableType:
    spans = (blocks.dim(block.aside),) if isinstance(block.aside, str) else block.aside
    title, aside = Text(block.title, "bold"), Text(" ").join(text for text in map(_span, spans) if text) or None
    return Panel(renderable(block.blocks), title=title, title_align="left", subtitle=aside, expand=False)


@renderable.register
def _(block: blocks.Stack) -> RenderableType:
    return renderable(block.blocks)


@renderable.register
def _(block: blocks.Line) -> RenderableType:
    return Text(" ").join(text for text in map(_span, block.spans) if text)


def _span(item: blocks.Span) -> Text:
    return Text(visible(item)) if isinstance(item, str) else Text(visible(item.text), _TONES.get(item.tone, ""))


@renderable.register
def _(block: blocks.Table) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(block.head):
        table.add_column(Text(title), justify="right" if place in block.right else "left")
    for place, row in enumerate(block.rows):
        cells = (Text("\n").join(map(_span, cell if isinstance(cell, tuple) else (cell,))) for cell in row)
        table.add_row(*cells, style="bold" if place in block.marked else "")
    return table


@renderable.register
def _(block: blocks.Bar) -> RenderableType:
    end = [f"{block.end_label}: {size(block.end)}"] if block.end is not None else []
    return _grid([(part_message(part),) for part in block.parts if part.byte_count] + [(*end, block.note)])


@renderable.register
def _(block: blocks.Columns) -> RenderableType:
    return _grid([(item.title, item.plain, item.aside) for item in block.boxes])


@renderable.register
def _(block: blocks.Commands) -> RenderableType:
    return _grid(block.commands)


@renderable.register
def _(block: blocks.HeatMap) -> RenderableType:
    def shade(cell: tuple[float, str] | None) -> str:
        return " " if cell is None else "·░▒▓█"[min(int(cell[0] * 5), 4)]

    return _grid([(label, "".join(map(shade, cells))) for label, cells in block.rows])


@renderable.register
def _(block: blocks.Histogram) -> RenderableType:
    rows = [
        (f"{first}–{last}", "█" * max(1, round(30 * number / block.most)), str(number))
        for first, last, number in block.bins
        if number
    ]
    heads = [block.caption, *([block.limit_label] if block.limit_label else [])]
    return Group(Text("; ".join(heads), "dim"), _grid(rows))


@renderable.register
def _(block: blocks.Tokens) -> RenderableType:
    title = [Text(block.title, "dim")] if block.title else []
    return Group(*title, Text.assemble(*map(_token_span, block.spans)))


def _token_span(item: blocks.TokenSpan) -> Text:
    if item.skipped:
        return Text(f" … {item.skipped} tokens … ", "dim")
    style = "strike dim" if item.cut else "yellow" if item.compared else "green" if item.learned else ""
    return Text(item.text, f"{style} bold" if item.special else style)


@renderable.register
def _(block: blocks.Figures) -> RenderableType:
    columns = block.figures
    return _grid([[item.label for item in columns], [item.figure for item in columns], [item.note for item in columns]])


@renderable.register
def _(block: blocks.Progress) -> RenderableType:
    return Text(f"{100 * block.done:.0f} %")


@renderable.register
def _(block: blocks.LossChart) -> RenderableType:
    from nbpeft.display.charts import describe

    return Text(describe(block.train), "dim")


@renderable.register
def _(block: blocks.SmallCharts) -> RenderableType:
    from nbpeft.display.training import small_curves

    return Text(" · ".join(f"{name} {last}" for name, _, last, _, _ in small_curves(block.train)), "dim")


@renderable.register
def _(block: blocks.CurveChart) -> RenderableType:
    from nbpeft.display.overlay import describe

    return Text(describe(block.curves, block.metric), "dim")


@renderable.register
def _(block: blocks.BarChart) -> RenderableType:
    rows = [
        (label, ("█" * round(20 * share)).ljust(20, "░"), block.value(number), *((figure,) if block.figure else ()))
        for number, (label, share, figure) in enumerate(block.bars)
    ]
    return _grid([*([("", "", "", block.figure)] if block.figure else []), *rows])


@renderable.register
def _(block: blocks.BarTable) -> RenderableType:
    head = ("", *(title for title, _ in block.columns))
    rows = [(label, *(bars[number][1] for _, bars in block.columns)) for number, label in enumerate(block.labels)]
    return _grid([head, *rows])


@renderable.register
def _(block: blocks.Grid) -> RenderableType:
    shares = dict(block.cells)
    rows = [
        (row, *(percent(shares[row, column]) if (row, column) in shares else NONE for column in block.columns))
        for row in block.rows
    ]
    return _grid([("", *block.columns), *rows])


@renderable.register
def _(block: blocks.Details) -> RenderableType:
    return Group(Text(block.summary, "dim"), renderable(block.block))
