"""Small pieces of HTML and text for results. Every string of a user is escaped here.

Colours come from JupyterLab's theme variables with fallbacks, so light and dark come for free;
all styles are inline, because notebooks that are not trusted lose style sheets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

_BORDER = "var(--jp-border-color2, rgba(128,128,128,.35))"
_DIM = "var(--jp-ui-font-color2, inherit)"
_TEXT = "var(--jp-ui-font-color1, inherit)"
_ACCENT = "var(--jp-brand-color1, #1976d2)"
_ERROR = "var(--jp-error-color1, #d32f2f)"
_WARN = "var(--jp-warn-color0, #b26a00)"
_FONT = "font:13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif);font-variant-numeric:tabular-nums"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(byte_count: int | None) -> str:
    """Bytes for a person, decimal units: ``18.6 MB``."""
    if byte_count is None:
        return "–"
    value, unit = float(byte_count), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{int(value)} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def count(number: int) -> str:
    """A whole number with thousands apart: ``4,884,480``."""
    return f"{number:,}"


def share(part: int, whole: int) -> str:
    """A part of a whole in per cent: ``3.48 %``."""
    return f"{100 * part / whole:.2f} %" if whole else "0 %"


def plural(number: int, noun: str, many: str | None = None) -> str:
    """``1 module``, ``2 modules``."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def names(items: Iterable[str], limit: int = 6) -> str:
    """``'a', 'b' and 3 more``."""
    quoted = [repr(item) for item in items]
    if len(quoted) <= limit:
        return ", ".join(quoted)
    return f"{', '.join(quoted[:limit])} and {len(quoted) - limit} more"


def name_or_path(text: str) -> str:
    """A name that may be broken behind its underscores and slashes, so that a long one leaves room for the rest."""
    return re.sub(r"([_/])(?=.)", r"\1<wbr>", escape(text))


def dim(text: str) -> str:
    """Secondary text."""
    return f'<span style="color:{_DIM}">{escape(text)}</span>'


def accent(text: str) -> str:
    """Text in the one accent colour."""
    return f'<span style="color:{_ACCENT};font-weight:600">{escape(text)}</span>'


def bold(text: str) -> str:
    """Text that is read first."""
    return f'<b style="font-weight:600">{escape(text)}</b>'


def bad(text: str) -> str:
    """Text that says that something is wrong."""
    return f'<span style="color:{_ERROR}">{escape(text)}</span>'


def warning(text: str) -> str:
    """Text that says that something may go wrong."""
    return f'<span style="color:{_WARN}">{escape(text)}</span>'


def card(title: str, *blocks: str, aside: str = "") -> str:
    """A bordered card.

    Args:
        title: plain text, escaped here.
        *blocks: HTML.
        aside: plain text on the right of the title, escaped here.
    """
    head = (
        f'<div style="display:flex;justify-content:space-between;gap:16px;align-items:baseline">'
        f"{bold(title)}{dim(aside) if aside else ''}</div>"
    )
    body = "".join(block for block in blocks if block)
    return (
        f'<div style="border:1px solid {_BORDER};border-radius:6px;padding:10px 14px;max-width:900px;'
        f'overflow-wrap:break-word;color:{_TEXT};{_FONT}">{head}{body}</div>'
    )


def line(*parts: str) -> str:
    """A line of HTML pieces."""
    return f'<div style="margin-top:6px">{" ".join(part for part in parts if part)}</div>'


def note(text: str) -> str:
    """A faint line of HTML; nothing for the empty string."""
    return line(dim(text)) if text else ""


def notes(items: Sequence[str]) -> str:
    """Notes under a result, one a line."""
    return "".join(f'<div style="margin-top:6px;color:{_WARN}">note: {escape(item)}</div>' for item in items)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = (), marked: Iterable[int] = ()
) -> str:
    """A table with inline styles. Columns on the right hold figures and are never broken into lines.

    Args:
        head: plain titles, escaped here.
        rows: cells as HTML; escape them with the helpers above or ``html.escape``.
        right: columns that are aligned to the right.
        marked: rows with the accent at their left edge.
    """
    to_right, with_mark = set(right), set(marked)

    def cell(tag: str, column: int, content: str, extra: str) -> str:
        align = "right;white-space:nowrap" if column in to_right else "left"
        return (
            f'<{tag} style="text-align:{align};padding:3px 8px;border-bottom:1px solid {_BORDER};'
            f'background:transparent;{extra}">{content}</{tag}>'
        )

    titles = "".join(
        cell("th", column, escape(title), f"font-weight:500;color:{_DIM}") for column, title in enumerate(head)
    )
    lines = []
    for number, row in enumerate(rows):
        first = f"box-shadow:inset 3px 0 {_ACCENT};" if number in with_mark else ""
        cells = "".join(cell("td", column, content, first if column == 0 else "") for column, content in enumerate(row))
        lines.append(f'<tr style="background:transparent">{cells}</tr>')
    return (
        '<div style="overflow-x:auto">'
        '<table style="border-collapse:collapse;table-layout:auto;width:100%;margin:8px 0 0;font-size:13px">'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def columns(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows as aligned plain text."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        (indent + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
