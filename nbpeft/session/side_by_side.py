"""Answers side by side as HTML and as text, with the words marked that differ from one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

from nbpeft.session import render

BORDER = "var(--jp-border-color2, rgba(128,128,128,.35))"
MARK = "rgba(114,183,178,.38)"
MONO = "var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace)"

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")
_MOST_IN_A_ROW = 4
_LEAST_WIDTH = 165
_UNLIKE = 0.3
"""Share of common words under which marking each difference would mark everything."""


def marked(text: str, reference: str) -> tuple[str, str]:
    """A text as HTML with what differs from a reference marked, and how it relates in words.

    Returns:
        HTML; and ``same``, ``differs throughout`` (then nothing is marked) or the empty string.
    """
    if text.split() == reference.split():
        return escape(text), "same"
    new, old = _PIECES.findall(text), _PIECES.findall(reference)
    if _likeness(new, old) < _UNLIKE:
        return escape(text), "differs throughout" if text and reference else ""
    return "".join(_mark(piece) if changed else escape(piece) for changed, piece in _runs(new, old)), ""


def _runs(new: Sequence[str], old: Sequence[str]) -> list[tuple[bool, str]]:
    """Stretches of the new text and whether each is a change.

    One word alone between two changes counts with them: marks that small are hard to read.
    """
    codes = [code for code in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if code[3] < code[4]]
    runs: list[tuple[bool, str]] = []
    for place, (kind, _, _, start, end) in enumerate(codes):
        beside = codes[max(place - 1, 0)], codes[min(place + 1, len(codes) - 1)]
        changed = kind != "equal" or (end - start == 1 and all(code[0] != "equal" for code in beside))
        piece = "".join(new[start:end])
        if runs and runs[-1][0] == changed:
            runs[-1] = (changed, runs[-1][1] + piece)
        else:
            runs.append((changed, piece))
    return runs


def columns(titles: Sequence[str], bodies: Sequence[str], asides: Sequence[str] = ()) -> str:
    """Boxes of equal width beside each other, wrapped where there is no room.

    Args:
        titles: plain text, escaped here.
        bodies: HTML of each box.
        asides: plain text on the right of each title.
    """
    notes = list(asides) or [""] * len(titles)
    rows = -(-len(titles) // _MOST_IN_A_ROW)
    across = -(-len(titles) // max(rows, 1))
    boxes = "".join(_box(*box) for box in zip(titles, bodies, notes, strict=True))
    # The first display is for notebooks that are not trusted, whose sanitizer drops the second.
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:10px;display:grid;'
        f"grid-template-columns:repeat(auto-fit,minmax(max(min(100%,{_LEAST_WIDTH}px),"
        f'(100% - {10 * (across - 1)}px)/{max(across, 1)}),1fr));margin-top:8px">{boxes}</div>'
    )


def text_rows(titles: Sequence[str], texts: Sequence[str]) -> str:
    """Answers under each other as plain text, titles in a column of their own."""
    width = max(map(len, titles), default=0)
    rows = []
    for title, text in zip(titles, texts, strict=True):
        first, *others = text.splitlines() or [""]
        rows.append(f"  {title.ljust(width)}  {first}".rstrip())
        rows.extend(f"  {' ' * width}  {line}".rstrip() for line in others)
    return "\n".join(rows)


def _box(title: str, body: str, aside: str) -> str:
    head = (
        '<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 8px;align-items:baseline;'
        'margin-bottom:4px">'
        f'<span style="font-weight:600;font-size:12px;overflow-wrap:anywhere">{escape(title)}</span>'
        f'<span style="font-size:11px;white-space:nowrap">{render.dim(aside) if aside else ""}</span></div>'
    )
    return (
        f'<div style="border:1px solid #9e9e9e;border:1px solid {BORDER};border-radius:4px;padding:6px 8px;'
        f'flex:1 1 {_LEAST_WIDTH}px;min-width:0;min-height:64px;box-sizing:border-box">{head}'
        f'<div style="font-family:monospace;font-family:{MONO};font-size:12px;line-height:1.4;white-space:pre-wrap;'
        f'overflow-wrap:anywhere;max-height:340px;overflow:auto">{body}</div></div>'
    )


def _mark(piece: str) -> str:
    """One change as a mark; spaces at its ends stay outside."""
    inner = piece.strip()
    if not inner:
        return escape(piece)
    start = piece.index(inner[0])
    before, after = piece[:start], piece[start + len(inner) :]
    return f'{before}<span style="background:{MARK};border-radius:2px">{escape(inner)}</span>{after}'


def _likeness(new: Sequence[str], old: Sequence[str]) -> float:
    words = [[piece for piece in pieces if not piece.isspace()] for pieces in (new, old)]
    return SequenceMatcher(None, words[1], words[0], autojunk=False).ratio()
