"""The result of exporting a training."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote

from nbpeft.display.blocks import Card, card, notes
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import NotedResult


@dataclass(frozen=True, repr=False)
class ExportResult(NotedResult):
    """A script was written.

    Attributes:
        script: its path.
        adapter: the adapter it trains.
        data: path and number of rows of each data file next to it.
    """

    script: str
    adapter: str
    data: tuple[tuple[str, int], ...]

    def _what(self) -> str:
        rows = " and ".join(f"{plural(count, 'row')} in {path}" for path, count in self.data)
        data = f", and {rows}" if rows else ""
        launch = f"accelerate launch {quote(self.script)}"
        return f"wrote {self.script}, which trains {self.adapter!r}{data}; run it with: {launch}"

    def view(self) -> Card:
        return card(self._what(), notes(self.notes))
