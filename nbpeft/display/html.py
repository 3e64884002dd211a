"""Renders blocks as HTML for a notebook. Every string is escaped here.

All styles are inline, because JupyterLab removes style sheets from notebooks that are not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import singledispatch

from nbpeft.display import blocks, palette
from nbpeft.display.charts import (
    BOTTOM,
    RIGHT,
    TOP,
    WIDTH,
    is_logarithmic,
    loss_chart,
    loss_columns,
    loss_image,
    loss_left,
    small_chart,
    spark_image,
)
from nbpeft.display.crosshair import Column, with_crosshair
from nbpeft.display.memory import label, part_message
from nbpeft.display.numbers import count, plural, size
from nbpeft.display.overlay import colour_of, overlay_chart, overlay_columns, overlay_image, overlay_left
from nbpeft.display.palette import background
from nbpeft.display.quoting import EACH_LINE, escape, isolated
from nbpeft.display.shares import bar_image, bar_table_image, grid_image
from nbpeft.display.training import small_curves
from nbpeft.state import ENDED

_TONES = {
    "bold": f"color:{palette.STRONG};font-weight:600",
    "dim": f"color:{palette.DIM}",
    "accent": f"color:{palette.ACCENT};font-weight:600",
    "success": f"color:{palette.SUCCESS_TEXT}",
    "error": f"color:{palette.ERROR_TEXT}",
    "warning": f"color:{palette.WARNING_TEXT}",
    "code": palette.MONOSPACE,
}
_WRAPS = {
    "never": "white-space:nowrap",
    "words": "white-space:normal",
    "cut": "display:flex;white-space:pre;min-width:0",
    "as is": f"white-space:pre-wrap;overflow-wrap:anywhere;{EACH_LINE}",
}
_MOST_IN_A_ROW = 4
_LEAST_WIDTH = 165
_HISTOGRAM = 64
_NAME, _PROSE = 84, 150
"""Least width of a table's first column, and of columns with sentences, in pixels."""
_CELL, _LEAST_CELL = 16, 5
"""Width of a heat map's cell in pixels, and the least width to which it shrinks if there is not enough room."""
_TAIL = 8
"""Number of characters at the end of a name that are always shown."""
_ELLIPSIS = "overflow:hidden;text-overflow:ellipsis"


def _shade(angle: int, edge: str, colour: str, whole: str, width: int, attachment: str) -> str:
    return f"linear-gradient({angle}deg,{colour} {whole},transparent) {edge} 0/{width}px 100% no-repeat {attachment}"


_SHADOW = "rgba(128,128,128,.5)"
SCROLLS = "overflow-x:auto;background:" + ",".join(
    (
        *(_shade(angle, edge, palette.PAPER, "40%", 40, "local") for angle, edge in ((90, "0"), (270, "100%"))),
        *(_shade(angle, edge, _SHADOW, "0%", 12, "scroll") for angle, edge in ((90, "0"), (270, "100%"))),
    )
)
"""Style of a box that scrolls if its content is too wide: a shadow lies at an edge behind which there is more.

The shadows stay at the edges; covers in the colour of the page scroll with the content and hide them at its ends.
"""


@singledispatch
def to_html(block: blocks.Block | tuple[blocks.Block, ...]) -> str:
    """Returns a block, or several, as HTML."""
    raise TypeError(f"not a block: {block!r:.80}")


@to_html.register
def _(block: tuple) -> str:  # type: ignore[type-arg]
    return "".join(to_html(part) for part in block)


def span(item: blocks.Span) -> str:
    """Returns a span of text as HTML."""
    if isinstance(item, str):
        return isolated(item)
    if not item.text:
        return ""
    if isinstance(item, blocks.Pill):
        return (
            f'<span style="{_TONES.get(item.tone, "")};font-weight:600;font-size:12px;white-space:nowrap;'
            f'border:1px solid currentColor;border-radius:10px;padding:1px 9px">{escape(item.text)}</span>'
        )
    if isinstance(item, blocks.Spark):
        return spark_image(item.points, item.text)
    if item.curve is not None:
        return _swatch(colour_of(item.curve)) + span(replace(item, curve=None))
    drawn = {"names": _broken, "words": _broken, "cut": _cut}.get(item.wrap, isolated)
    text = drawn(item.text)
    style = ";".join(part for part in (_TONES.get(item.tone, ""), _WRAPS.get(item.wrap, "")) if part)
    tooltip = f' title="{escape(item.tooltip)}"' if item.tooltip else ""
    style = f' style="{style}"' if style else ""
    if item.href.startswith(("https://", "http://")):
        return f'<a href="{escape(item.href)}" target="_blank"{tooltip}{style}>{text}</a>'
    if not style and not tooltip:
        return text
    tag = "b" if item.tone == "bold" else "span"
    return f"<{tag}{tooltip}{style}>{text}</{tag}>"


def _broken(text: str) -> str:
    """Returns a name that may wrap after underscores and slashes."""
    return re.sub(r"([_/])(?=.)", r"\1<wbr>", escape(text))


def _cut(text: str) -> str:
    """Returns a name with an ellipsis in the middle: names of one experiment differ at the end."""
    if len(text) <= 2 * _TAIL:
        return f'<span style="{_ELLIPSIS}">{escape(text)}</span>'
    start, end = escape(text[:-_TAIL]), escape(text[-_TAIL:])
    return f'<span style="{_ELLIPSIS}">{start}</span><span style="flex:none">{end}</span>'


def head(title: str, aside: blocks.Span | tuple[blocks.Span, ...] = "", *, below: int = 0) -> str:
    """Returns the title line of a card or a panel.

    Args:
        title: text on the left.
        aside: text on the right.
        below: bottom margin in pixels.
    """
    margin = f";margin-bottom:{below}px" if below else ""
    right = " ".join(map(span, aside if isinstance(aside, tuple) else (aside,)))
    return (
        '<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 16px;align-items:baseline'
        f'{margin}">'
        f"{span(blocks.bold(title))}"
        f'<span style="text-align:right">{right}</span></div>'
    )


@to_html.register
def _(block: blocks.Card) -> str:
    body = "".join(to_html(part) for part in block.blocks if part is not None)
    # MathJax (its third and second version) leaves such elements alone: rows have prices between dollar signs.
    return (
        '<div class="mathjax_ignore tex2jax_ignore" '
        f'style="border:1px solid {palette.BORDER};border-radius:6px;padding:10px 14px;'
        f"max-width:{'none' if block.wide else f'{palette.WIDTH}px'};box-sizing:border-box;"
        f'overflow-wrap:break-word;color:{palette.TEXT};{palette.FONT}">'
        f"{head(block.title, blocks.dim(block.aside) if isinstance(block.aside, str) else block.aside)}{body}</div>"
    )


@to_html.register
def _(block: blocks.Stack) -> str:
    return '<div style="height:10px"></div>'.join(map(to_html, block.blocks))


@to_html.register
def _(block: blocks.Line) -> str:
    words = " ".join(filter(None, map(span, block.spans)))
    return f'<div style="margin-top:6px">{words}</div>' if words else ""


to_html.register(blocks.BarChart, bar_image)
to_html.register(blocks.BarTable, bar_table_image)
to_html.register(blocks.Grid, grid_image)


@to_html.register
def _(block: blocks.Details) -> str:
    group = f' name="{escape(block.group)}"' if block.group else ""
    summary = f"<summary>{escape(block.summary)}</summary>"
    return f'<details{group} style="margin-top:6px">{summary}{to_html(block.block)}</details>'


@to_html.register
def _(block: blocks.Table) -> str:
    def cell(tag: str, column: int, content: str, extra: str) -> str:
        align = "left" if column not in block.right else "right;white-space:nowrap" if tag == "td" else "right"
        align += f";width:{block.first}%" if block.first and not column else ""
        least = _PROSE if column in block.prose else _NAME if not column else 0
        align += f";min-width:{least}px" if least else ""
        return (
            f'<{tag} style="text-align:{align};padding:3px 8px;border-bottom:1px solid {palette.BORDER};'
            f'background:transparent;{extra}">{content}</{tag}>'
        )

    faint = f"font-weight:500;color:{palette.DIM}"
    titles = "".join(cell("th", column, _broken(title), faint) for column, title in enumerate(block.head))
    rows = []
    for number, row in enumerate(block.rows):
        first = f"box-shadow:inset 3px 0 {palette.ACCENT};" if number in block.marked else ""
        cells = (
            cell("td", column, _content(_name(item) if not column else item), "" if column else first)
            for column, item in enumerate(row)
        )
        rows.append(f'<tr style="background:transparent">{"".join(cells)}</tr>')
    return (
        f'<div style="{SCROLLS}">'
        '<table style="border-collapse:collapse;table-layout:auto;width:100%;margin:8px 0 0;font-size:13px;'
        'overflow-wrap:normal">'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _name(item: blocks.Cell) -> blocks.Cell:
    """Returns a cell of the first column, whose plain text may wrap after underscores."""
    return blocks.Text(item, wrap="names") if isinstance(item, str) else item


def _content(item: blocks.Cell) -> str:
    if not isinstance(item, tuple):
        return span(item)
    first, *others = map(span, item)
    return first + "".join(f'<div style="font-size:12px">{other}</div>' for other in others if other)


@to_html.register
def _(block: blocks.Bar) -> str:
    parts = [part for part in block.parts if part.byte_count]
    height, letters = ("6px", "11px") if block.thin else ("14px", "12px")
    pieces = "".join(
        f'<div title="{escape(part_message(part))}" style="width:{100 * part.byte_count / block.whole:.2f}%;'
        f'height:{height};background:{palette.of_part(part.name)}"></div>'
        for part in parts
    )
    legend = "".join(
        f'<span title="{escape(part.detail)}">{_swatch(palette.of_part(part.name))}'
        f"{escape(label(part.name))} {size(part.byte_count)}</span>"
        for part in parts
    )
    note = span(blocks.dim(block.note))
    return (
        f'<div style="display:flex;height:{height};border-radius:3px;overflow:hidden;margin:8px 0 0;'
        f'{background(palette.FILL)}">{pieces}</div>{_end(block)}'
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 16px;font-size:{letters}">{legend}{note}</div>'
    )


def _end(bar: blocks.Bar) -> str:
    """Returns the mark below the bar that shows where the device's memory ends."""
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


def _swatch(colour: str, opacity: str = "") -> str:
    return (
        '<span style="display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px;'
        f'{f"opacity:{opacity};" if opacity else ""}{background(colour)}"></span>'
    )


@to_html.register
def _(block: blocks.Columns) -> str:
    rows = -(-len(block.boxes) // _MOST_IN_A_ROW)
    across = -(-len(block.boxes) // max(rows, 1))
    # The first ``display`` is for notebooks that are not trusted: the sanitizer drops the second one.
    boxes = "".join(map(_box, block.boxes))
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:10px;display:grid;'
        f"grid-template-columns:repeat(auto-fit,minmax(max(min(100%,{_LEAST_WIDTH}px),"
        f'(100% - {10 * (across - 1)}px)/{max(across, 1)}),1fr));margin-top:8px">{boxes}</div>'
    )


@to_html.register
def _(block: blocks.Commands) -> str:
    cells = "".join(
        f'<span style="white-space:nowrap">{span(blocks.dim(label))}</span>'
        f'<code style="overflow-wrap:anywhere;background:transparent;padding:0;color:{palette.TEXT};'
        f'{palette.MONOSPACE};font-size:12px">{escape(command)}</code>'
        for label, command in block.commands
    )
    grid = "display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 14px;align-items:baseline"
    return f'<div style="margin-top:4px;font-size:12px;{grid}">{cells}</div>'


def _box(box: blocks.Box) -> str:
    text = "".join(_marked(piece) if changed else escape(piece) for piece, changed in box.runs)
    aside = span(blocks.Text(box.aside, box.tone))
    ending = span(blocks.dim(box.ending))
    return (
        f'<div style="border:1px solid #9e9e9e;border:1px solid {palette.BORDER};border-radius:4px;padding:6px 8px;'
        f'flex:1 1 {_LEAST_WIDTH}px;min-width:0;min-height:64px;box-sizing:border-box">'
        '<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 8px;align-items:baseline;'
        'margin-bottom:4px">'
        f'<span style="font-weight:600;font-size:12px;overflow-wrap:anywhere">{escape(box.title)}</span>'
        f'<span style="font-size:11px;white-space:nowrap">{aside}</span></div>'
        f'<div style="{palette.MONOSPACE};font-size:12px;line-height:1.4;white-space:pre-wrap;{EACH_LINE};'
        f'overflow-wrap:anywhere;max-height:340px;overflow:auto">{text}{ending}</div></div>'
    )


def _marked(piece: str) -> str:
    """Returns a highlighted change; spaces at its ends are not highlighted."""
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
        f'<div style="{label}">{escape(name)}</div><div style="display:flex;gap:1px;min-width:{_least_width(cells)}px">'
        f"{''.join(map(_heat, cells))}</div>"
        for name, cells in block.rows
    )
    grid = "display:grid;grid-template-columns:max-content minmax(0,1fr);row-gap:2px;align-items:center"
    return f'<div style="{grid};margin-top:10px;{SCROLLS}">{rows}</div>'


def _least_width(cells: Sequence[object]) -> int:
    """Returns the width in pixels to which a row of a heat map can shrink."""
    return len(cells) * (_LEAST_CELL + 1)


def _heat(cell: tuple[float, str] | None) -> str:
    shape = f"width:{_CELL}px;height:{_CELL}px;border-radius:2px;flex:0 1 auto;min-width:0"
    if cell is None:
        return f'<div style="{shape}"></div>'
    value, tooltip = cell
    opacity = 0.06 + 0.94 * min(value, 1.0)
    return f'<div title="{escape(tooltip)}" style="{shape};{background(palette.ACCENT)};opacity:{opacity:.2f}"></div>'


@to_html.register
def _(block: blocks.Histogram) -> str:
    bars = "".join(_histogram_bar(block, edges) for edges in block.bins)
    within = [last for _, last, _ in block.bins if block.limit is not None and last <= block.limit]
    share = 100 * len(within) / len(block.bins) if block.limit in within else None
    faint = f"font-size:11px;color:{palette.DIM}"
    return (
        f'<div role="img" aria-label="{escape(histogram_words(block))}" style="display:flex;align-items:flex-end;'
        f'gap:1px;height:{_HISTOGRAM}px;margin-top:8px">{bars}</div>'
        f'<div style="height:1px;background:{palette.LIMIT}"></div>{_limit_mark(block.limit_label, share)}'
        f'<div style="display:flex;justify-content:space-between;gap:12px;text-align:center;{faint}">'
        f"<span>{block.bins[0][0]}</span>"
        f"<span>{escape(block.caption)}</span>"
        f"<span>{count(block.bins[-1][1])}</span></div>"
    )


def _histogram_bar(block: blocks.Histogram, edges: tuple[int, int, int]) -> str:
    first, last, number = edges
    height = max(2, round(_HISTOGRAM * number / block.most)) if number else 0
    beyond = block.limit is not None and first > block.limit
    sizes = plural(last, block.size_noun) if first == last else f"{count(first)} to {plural(last, block.size_noun)}"
    colour = f"background:{palette.CUT}" if beyond else background(palette.ACCENT)
    return (
        f'<div title="{escape(f"{sizes}: {plural(number, block.noun)}")}" '
        f'style="flex:1 1 0;height:{height}px;{colour}"></div>'
    )


def _limit_mark(label: str, share: float | None) -> str:
    """Returns a tick below the bars at the limit, with its label on the side that has more room."""
    if share is None:
        return ""
    left, right = f"margin-left:{share:.2f}%;border-left", f"width:{share:.2f}%;text-align:right;border-right"
    side = left if share <= 50 else right
    return (
        f'<div style="box-sizing:border-box;{side}:2px solid {palette.CUT};padding:0 4px;font-size:11px;'
        f'white-space:nowrap">{escape(label)}</div>'
    )


def histogram_words(block: blocks.Histogram) -> str:
    """Returns a description of a histogram for screen readers."""
    total = sum(number for *_, number in block.bins)
    return f"{plural(total, block.noun)} of {block.bins[0][0]} to {plural(block.bins[-1][1], block.size_noun)}"


@to_html.register
def _(block: blocks.Tokens) -> str:
    text = "".join(map(_token_span, block.spans))
    title = f'<div style="margin-top:10px;font-size:12px">{span(blocks.dim(block.title))}</div>' if block.title else ""
    frame = (
        f"border:1px solid #9e9e9e;border:1px solid {palette.BORDER};border-radius:4px;padding:6px 8px;"
        "max-height:260px;overflow:auto;"
    )
    return (
        f'{title}<div style="{frame if block.framed else ""}margin-top:{3 if title else 10}px;{palette.MONOSPACE};'
        f'font-size:12px;line-height:1.55;white-space:pre-wrap;{EACH_LINE};overflow-wrap:anywhere">{text}</div>'
    )


def _token_span(item: blocks.TokenSpan) -> str:
    if item.skipped:
        return span(blocks.dim(f" … {plural(item.skipped, 'token')} … "))
    background = palette.COMPARED if item.compared else palette.LEARNED if item.learned else ""
    styles = [
        f"background:{background};border-radius:2px" if background and not item.cut else "",
        f"text-decoration:line-through;color:{palette.DIM}" if item.cut else "",
        f"border:1px solid {palette.LIMIT};border-radius:4px;padding:0 2px;font-size:11px" if item.special else "",
    ]
    style = ";".join(filter(None, styles))
    tag = "bdi" if item.special else "span"
    return f'<{tag} style="{style}">{escape(item.text)}</{tag}>' if style else escape(item.text)


@to_html.register
def _(block: blocks.Figures) -> str:
    small = f"font-size:11px;line-height:1.4;white-space:nowrap;color:{palette.DIM}"
    cells = "".join(
        f'<div title="{escape(item.tooltip)}" style="min-width:{item.width}px">'
        f'<div style="{small}">{escape(item.label)}</div>'
        f'<div style="font-size:19px;line-height:1.3;white-space:nowrap;color:{palette.STRONG}">'
        f'{escape(item.figure)}</div><div style="{small};min-height:15px">{escape(item.note)}</div></div>'
        for item in block.figures
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 22px;margin:8px 0 4px">{cells}</div>'


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
    entries = [(palette.ACCENT, "", "loss"), (palette.ACCENT, ".35", "smoothed")]
    entries += [(palette.EVALUATION, "", "eval loss (best step circled)")] if train.eval_history else []
    legend = "".join(f"<span>{_swatch(colour, opacity)}{label}</span>" for colour, opacity, label in entries)
    scale = span(blocks.dim("log scale" if is_logarithmic(train) else ""))
    chart = loss_image(train) if train.status in ENDED else loss_chart(train)
    return (
        f'<div style="margin-top:8px">{_with_values(chart, loss_columns(train), loss_left(train))}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 16px;margin-top:2px;font-size:12px">{legend}{scale}</div>'
    )


def _with_values(chart: str, shown: Sequence[Column], left: float) -> str:
    """Returns a chart with the values under the mouse; ``left`` is the space to the left of its curves in percent."""
    return f'<div style="max-width:{WIDTH}px">{with_crosshair(chart, shown, left, RIGHT, TOP, BOTTOM)}</div>'


@to_html.register
def _(block: blocks.SmallCharts) -> str:
    train = block.train
    small = f"display:flex;justify-content:space-between;gap:8px;font-size:11px;color:{palette.DIM}"
    cells = "".join(
        f'<div title="{escape(f"{name}: from {low} to {high}, now {last}")}" style="flex:1 1 140px;max-width:210px">'
        f'<div style="{small}"><span>{escape(name)}</span><span style="color:{palette.STRONG}">{escape(last)}</span>'
        f"</div>{small_chart(curve, train)}</div>"
        for name, curve, last, low, high in small_curves(train)
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px 20px;margin-top:10px">{cells}</div>' if cells else ""


@to_html.register
def _(block: blocks.CurveChart) -> str:
    labels = "".join(
        f"<span>{_swatch(colour_of(place))}{escape(label)}</span>" for place, (label, _, _) in enumerate(block.curves)
    )
    legend = labels if block.legend else ""
    if any(evaluated for _, _, evaluated in block.curves):
        legend += f"<span style='color:{palette.DIM}'>dashed: eval {escape(block.metric or 'loss')}</span>"
    style = "display:flex;flex-wrap:wrap;gap:2px 16px;margin-top:4px;font-size:12px"
    chart = (overlay_chart if block.live else overlay_image)(block.curves, block.metric)
    title = f'<div style="font-size:12px;color:{palette.DIM}">{escape(block.metric)}</div>' if block.metric else ""
    shown = title + _with_values(chart, overlay_columns(block.curves), overlay_left(block.curves))
    return f'<div style="margin-top:8px">{shown}</div><div style="{style}">{legend}</div>'


def grid_row(cells: Iterable[tuple[blocks.Cell, str]], widths: str = "") -> str:
    """Returns one row of a panel's table.

    Args:
        cells: (content, CSS classes) of each cell.
        widths: the CSS widths of the columns; by default the panel's style sheet lays them out.
    """
    drawn = "".join(f'<div class="{kind}">{_content(item)}</div>' for item, kind in cells)
    style = f' style="grid-template-columns:{widths}"' if widths else ""
    return f'<div class="nbpeft-grid"{style}>{drawn}</div>'
