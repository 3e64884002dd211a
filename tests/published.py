"""What is published: pages whose links lead somewhere, and files that name no place on somebody's machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat

_SLASH = "/"  # so that this file does not name such a place either
MACHINE_PATHS = re.compile(rf"(?<![\w.]){_SLASH}(root|work|opt{_SLASH}wheels|home{_SLASH}\w+|Users{_SLASH}\w+){_SLASH}")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".ipynb", ".json", ".css", ".html", ".svg", ".cfg", ".txt", ".yml", ".yaml"}
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@cache
def text_of(page: Path) -> str:
    """The Markdown of a page or a notebook."""
    if page.suffix == ".ipynb":
        return "\n".join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "markdown")
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its snippets."""
    return FENCE.sub("", text_of(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and JupyterLab's converters make them, and those it sets itself."""
    made = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(prose_of(page))}
    return made | set(re.findall(r'<a id="([^"]+)">', text_of(page)))


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Relative links whose file or anchor is not there."""
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link
