"""What a request to a training gives: it is carried out when the step that runs has ended."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Line, line
from nbpeft.session.results.base import Result


@dataclass(frozen=True, repr=False)
class RequestResult(Result):
    """A training was asked for something.

    Attributes:
        adapter: that it trains.
        request: what it will do, e.g. ``stops after the step it is in``.
        step: the last one that has ended.
        total_steps: steps planned; None where that is not known.
    """

    adapter: str
    request: str
    step: int
    total_steps: int | None

    def __str__(self) -> str:
        of = f" of {self.total_steps:,}" if self.total_steps is not None else ""
        return f"training {self.adapter or 'model'} {self.request} (step {self.step:,}{of})"

    def view(self) -> Line:
        """The same as ``str``."""
        return line(str(self))
