"""The result of a request to a training, which carries it out after the current step."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Line, line
from nbpeft.session.results.base import Result


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
