"""How foreign text is written into HTML: every module of this package that writes HTML or SVG takes it from here."""

from __future__ import annotations

import html

from nbpeft.errors import visible


def escape(text: str) -> str:
    """Returns text for HTML or SVG, its control characters shown."""
    return html.escape(visible(text))
