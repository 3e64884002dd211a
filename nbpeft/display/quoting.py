"""How foreign text is written into HTML: every module of this package that writes HTML or SVG takes it from here."""

from __future__ import annotations

import html
import re

from nbpeft.errors import visible

_RTL = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff"
"""The blocks of Unicode with scripts that are written from right to left."""
_RTL_WORDS = re.compile(rf"(?<!\S)[^\s{_RTL}]*[{_RTL}]\S*(?:\s+[^\s{_RTL}]*[{_RTL}]\S*)*")
_NOT_IN_A_PAGE = re.compile("[\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Overrides of the direction of writing, which move what is beside a text even out of a ``bdi``; lone surrogates."""
EACH_LINE = "unicode-bidi:plaintext;text-align:start"
"""Style of foreign text of several lines, each of which is written in the direction of its first letter."""


def escape(text: str) -> str:
    """Returns text for HTML or SVG, its control characters and those that a page cannot contain shown."""
    return html.escape(_NOT_IN_A_PAGE.sub("\ufffd", visible(text)))


def isolated(text: str) -> str:
    """Returns text for HTML as ``escape`` does; words written from right to left do not move what is beside them."""
    parts, start = [], 0
    for match in _RTL_WORDS.finditer(text):
        parts += [escape(text[start : match.start()]), f"<bdi>{escape(match[0])}</bdi>"]
        start = match.end()
    return "".join([*parts, escape(text[start:])])
