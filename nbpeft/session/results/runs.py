"""The result of exporting a training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from shlex import quote

from nbpeft.display.blocks import Card, card, notes
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import Result


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """A script was written.

    Attributes:
        script: its path.
        adapter: the adapter it trains.
        data: path and number of rows of each data file next to it.
        notes: messages for the user.
    """

    script: str
    adapter: str
    data: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = " and ".join(f"{plural(count, 'row')} in {path}" for path, count in self.data)
        data = f", and {rows}" if rows else ""
        launch = f"accelerate launch {quote(self.script)}"
        return with_notes(
            f"wrote {self.script}, which trains {self.adapter!r}{data}; run it with: {launch}", self.notes
        )

    def view(self) -> Card:
        """Shows what was written."""
        return card(str(dataclasses.replace(self, notes=())), notes(self.notes))
