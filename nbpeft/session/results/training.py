"""Results of commands about a training: requests, which it carries out after its current step, and its export."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote

from nbpeft.display.blocks import Card, Line, card, line, notes
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import NotedResult, Result


@dataclass(frozen=True, repr=False)
class RequestResult(Result):
    """A request was sent to a training.

    Attributes:
        adapter: the adapter that it trains.
        request: what the training will do, e.g. ``stops after the current step``.
        step: the last completed step.
        total_steps: number of planned steps; None if unknown.
    """

    adapter: str
    request: str
    step: int
    total_steps: int | None

    def __str__(self) -> str:
        of = f" of {self.total_steps:,}" if self.total_steps is not None else ""
        return f"training {self.adapter or 'model'} {self.request} (step {self.step:,}{of})"

    def view(self) -> Line:
        return line(str(self))


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
