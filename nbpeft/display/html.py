"""Blocks as HTML for a notebook. Every string is escaped here.

All styles are inline, because notebooks that are not trusted lose style sheets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import singledispatch
from html import escape

from nbpeft.display import blocks, palette
from nbpeft.display.charts import loss_chart, loss_image
from nbpeft.display.memory import label, part_words
from nbpeft.display.numbers import size
from nbpeft.display.palette import background
from nbpeft.state import ENDED

_TONES = {
    "bold": f"color:{palette.STRONG};font-weight:600",
    "dim": f"color:{palette.DIM}",
    "accent": f"color:{palette.ACCENT};font-weight:600",
    "error": f"color:{palette.ERROR}",
    "warning": f"color:{palette.WARNING}",
    "code": palette.MONOSPACE,
}
_WRAPS = {
    "never": "white-space:nowrap",
    "cut": "display:flex;white-space:pre;min-width:0",
    "as is": "white-space:pre-wrap;overflow-wrap:anywhere",
}
_MOST_IN_A_ROW = 4
_LEAST_WIDTH = 165
_CELL = 16
"""Pixels."""
_TAIL = 8
"""Letters at the end of a name that are always seen."""
_ELLIPSIS = "overflow:hidden;text-overflow:ellipsis"


@singledispatch
def to_html(block: blocks.Block | tuple[blocks.Block, ...]) -> str:
    """A block, or several, as HTML."""
    raise TypeError(f"not a block: {block!r:.80}")


@to_html.register
def _(block: tuple) -> str:  # type: ignore[type-arg]
    return "".join(to_html(part) for part in block)


def span(item: blocks.Span) -> str:
    """A stretch of text."""
    if isinstance(item, str):
        return escape(item)
    if not item.text:
        return ""
    text = _broken(item.text) if item.wrap == "names" else _cut(item.text) if item.wrap == "cut" else escape(item.text)
    style = ";".join(part for part in (_TONES.get(item.tone, ""), _WRAPS.get(item.wrap, "")) if part)
    tooltip = f' title="{escape(item.tooltip)}"' if item.tooltip else ""
    style = f' style="{style}"' if style else ""
    if not style and not tooltip:
        return text
    tag = "b" if item.tone == "bold" else "span"
    return f"<{tag}{tooltip}{style}>{text}</{tag}>"


def _broken(text: str) -> str:
    """A name that may be broken behind underscores and slashes."""
    return re.sub(r"([_/])(?=.)", r"\1<wbr>", escape(text))


def _cut(text: str) -> str:
    """A name with the ellipsis in its middle: adapters of one experiment differ at the end."""
    if len(text) <= 2 * _TAIL:
        return f'<span style="{_ELLIPSIS}">{escape(text)}</span>'
    start, end = escape(text[:-_TAIL]), escape(text[-_TAIL:])
    return f'<span style="{_ELLIPSIS}">{start}</span><span style="flex:none">{end}</span>'


def head(title: str, aside: blocks.Span = "", *, below: int = 0) -> str:
    """The title line of a card or a panel.

    Args:
        title: on the left.
        aside: on the right.
        below: pixels to what follows.
    """
    margin = f";margin-bottom:{below}px" if below else ""
    return (
        '<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 16px;align-items:baseline'
        f'{margin}">'
        f"{span(blocks.bold(title))}"
        f'<span style="text-align:right">{span(aside)}</span></div>'
    )


@to_html.register
def _(block: blocks.Card) -> str:
    body = "".join(to_html(part) for part in block.blocks if part is not None)
    return (
        f'<div style="border:1px solid {palette.BORDER};border-radius:6px;padding:10px 14px;'
        f"max-width:{palette.WIDTH}px;box-sizing:border-box;"
        f'overflow-wrap:break-word;color:{palette.TEXT};{palette.FONT}">'
        f"{head(block.title, blocks.dim(block.aside))}{body}</div>"
    )


@to_html.register
def _(block: blocks.Stack) -> str:
    return '<div style="height:10px"></div>'.join(map(to_html, block.blocks))


@to_html.register
def _(block: blocks.Line) -> str:
    words = " ".join(filter(None, map(span, block.spans)))
    return f'<div style="margin-top:6px">{words}</div>' if words else ""


@to_html.register
def _(block: blocks.Details) -> str:
    return f'<details style="margin-top:6px"><summary>{escape(block.summary)}</summary>{to_html(block.block)}</details>'


@to_html.register
def _(block: blocks.Table) -> str:
    def cell(tag: str, column: int, content: str, extra: str) -> str:
        # Only the first column gives way where there is no room: others would be broken letter by letter.
        align = "right;white-space:nowrap" if column in block.right else "left"
        align += "" if column else ";overflow-wrap:anywhere"
        return (
            f'<{tag} style="text-align:{align};padding:3px 8px;border-bottom:1px solid {palette.BORDER};'
            f'background:transparent;{extra}">{content}</{tag}>'
        )

    faint = f"font-weight:500;color:{palette.DIM}"
    titles = "".join(cell("th", column, escape(title), faint) for column, title in enumerate(block.head))
    rows = []
    for number, row in enumerate(block.rows):
        first = f"box-shadow:inset 3px 0 {palette.ACCENT};" if number in block.marked else ""
        cells = (cell("td", column, _content(item), "" if column else first) for column, item in enumerate(row))
        rows.append(f'<tr style="background:transparent">{"".join(cells)}</tr>')
    return (
        '<div style="overflow-x:auto">'
        '<table style="border-collapse:collapse;table-layout:auto;width:100%;margin:8px 0 0;font-size:13px">'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _content(item: blocks.Cell) -> str:
    if not isinstance(item, tuple):
        return span(item)
    first, *others = map(span, item)
    return first + "".join(f'<div style="font-size:12px">{other}</div>' for other in others if other)


@to_html.register
def _(block: blocks.Bar) -> str:
    parts = [part for part in block.parts if part.byte_count]
    pieces = "".join(
        f'<div title="{escape(part_words(part))}" style="width:{100 * part.byte_count / block.whole:.2f}%;height:14px;'
        f'background:{palette.of_part(part.name)}"></div>'
        for part in parts
    )
    legend = "".join(
        f'<span title="{escape(part.detail)}">{_swatch(palette.of_part(part.name))}'
        f"{escape(label(part.name))} {size(part.byte_count)}</span>"
        for part in parts
    )
    note = span(blocks.dim(block.note))
    return (
        '<div style="display:flex;height:14px;border-radius:3px;overflow:hidden;margin:8px 0 0;'
        f'{background(palette.FILL)}">{pieces}</div>{_end(block)}'
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12px">{legend}{note}</div>'
    )


def _end(bar: blocks.Bar) -> str:
    """Where the device ends, below the bar."""
    if bar.end is None:
        return '<div style="height:6px"></div>'
    share, over = 100 * min(bar.end / bar.whole, 1.0), bar.end < bar.whole
    colour = palette.PLAIN[palette.ERROR] if over else palette.LIMIT
    beyond = f'<div style="width:{100 - share:.2f}%;height:3px;background:{colour}"></div>' if over else ""
    place = f"text-align:right;width:{share:.2f}%" if share > 60 else f"text-align:left;margin-left:{share:.2f}%"
    return (
        '<div style="display:flex;height:3px;margin-top:2px">'
        f'<div style="box-sizing:border-box;width:{share:.2f}%;height:3px;border-right:2px solid {colour}"></div>'
        f'{beyond}</div><div style="font-size:11px;margin-bottom:4px;{place}">{span(blocks.dim(bar.end_label))}</div>'
    )


def _swatch(colour: str) -> str:
    return (
        '<span style="display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px;'
        f'{background(colour)}"></span>'
    )


@to_html.register
def _(block: blocks.Columns) -> str:
    rows = -(-len(block.boxes) // _MOST_IN_A_ROW)
    across = -(-len(block.boxes) // max(rows, 1))
    # The first display is for notebooks that are not trusted, whose sanitizer drops the second.
    boxes = "".join(map(_box, block.boxes))
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:10px;display:grid;'
        f"grid-template-columns:repeat(auto-fit,minmax(max(min(100%,{_LEAST_WIDTH}px),"
        f'(100% - {10 * (across - 1)}px)/{max(across, 1)}),1fr));margin-top:8px">{boxes}</div>'
    )


def _box(box: blocks.Box) -> str:
    text = "".join(_marked(piece) if changed else escape(piece) for piece, changed in box.runs)
    aside = span(blocks.dim(box.aside))
    ending = span(blocks.dim(box.ending))
    return (
        f'<div style="border:1px solid #9e9e9e;border:1px solid {palette.BORDER};border-radius:4px;padding:6px 8px;'
        f'flex:1 1 {_LEAST_WIDTH}px;min-width:0;min-height:64px;box-sizing:border-box">'
        '<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 8px;align-items:baseline;'
        'margin-bottom:4px">'
        f'<span style="font-weight:600;font-size:12px;overflow-wrap:anywhere">{escape(box.title)}</span>'
        f'<span style="font-size:11px;white-space:nowrap">{aside}</span></div>'
        f'<div style="{palette.MONOSPACE};font-size:12px;line-height:1.4;white-space:pre-wrap;'
        f'overflow-wrap:anywhere;max-height:340px;overflow:auto">{text}{ending}</div></div>'
    )


def _marked(piece: str) -> str:
    """One change as a mark; spaces at its ends stay outside."""
    inner = piece.strip()
    if not inner:
        return escape(piece)
    start = piece.index(inner[0])
    before, after = piece[:start], piece[start + len(inner) :]
    return f'{before}<span style="background:{palette.CHANGED};border-radius:2px">{escape(inner)}</span>{after}'


@to_html.register
def _(block: blocks.HeatMap) -> str:
    label = "font-size:12px;text-align:right;white-space:nowrap;padding-right:8px"
    rows = "".join(
        f'<div style="{label}">{escape(name)}</div><div style="display:flex;gap:1px">{"".join(map(_heat, cells))}</div>'
        for name, cells in block.rows
    )
    grid = "display:grid;grid-template-columns:max-content auto;row-gap:2px;align-items:center"
    return f'<div style="{grid};margin-top:10px;overflow-x:auto">{rows}</div>'


def _heat(cell: tuple[float, str] | None) -> str:
    shape = f"width:{_CELL}px;height:{_CELL}px;border-radius:2px;flex:none"
    if cell is None:
        return f'<div style="{shape}"></div>'
    value, tooltip = cell
    opacity = 0.06 + 0.94 * min(value, 1.0)
    return f'<div title="{escape(tooltip)}" style="{shape};{background(palette.ACCENT)};opacity:{opacity:.2f}"></div>'


@to_html.register
def _(block: blocks.Figures) -> str:
    cells = "".join(
        f'<div style="min-width:{width}px"><div style="font-size:19px;line-height:1.35;white-space:nowrap;'
        f'color:{palette.STRONG}">{escape(figure)}</div>'
        f'<div style="font-size:11px;white-space:nowrap;color:{palette.DIM}">{escape(label)}</div></div>'
        for figure, label, width in block.figures
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px 28px;margin:8px 0">{cells}</div>'


@to_html.register
def _(block: blocks.Progress) -> str:
    colour = background(palette.ERROR if block.failed else palette.ACCENT)
    return (
        f'<div style="height:6px;border-radius:3px;overflow:hidden;margin:6px 0 10px;{background(palette.FILL)}">'
        f'<div style="width:{100 * block.done:.1f}%;height:6px;{colour}"></div></div>'
    )


@to_html.register
def _(block: blocks.LossChart) -> str:
    train = block.train
    entries = [(palette.ACCENT, "training loss")]
    entries += [(palette.EVALUATION, "eval loss")] if train.eval_history else []
    legend = "".join(f"<span>{_swatch(colour)}{label}</span>" for colour, label in entries)
    chart = loss_image(train) if train.status in ENDED else loss_chart(train)
    return f'{chart}<div style="display:flex;gap:16px;margin-top:4px;font-size:12px">{legend}</div>'


def grid_row(cells: Iterable[tuple[blocks.Cell, str]]) -> str:
    """One row of a panel's table, whose columns the panel's style sheet lays out.

    Args:
        cells: content and CSS classes of each.
    """
    drawn = "".join(f'<div class="{kind}">{_content(item)}</div>' for item, kind in cells)
    return f'<div class="nbpeft-grid">{drawn}</div>'
