"""The result of a sweep, for the output of a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from nbpeft.display import numbers
from nbpeft.display.blocks import Block, Stack
from nbpeft.display.training import members_table
from nbpeft.state import MemberState
from nbpeft.training.monitor.result import TrainResult


@dataclass(frozen=True, repr=False)
class SweepResult(TrainResult):
    """The result of training several adapters; values other than ``members`` are for all of them together.

    Attributes:
        best: the adapter with the best score or value of ``metric_for_best_model``, else with the lowest evaluation
            loss, or training loss if there was no evaluation. It is active.
        best_fields: its own fields of ``TrainingArguments``.
    """

    best: str = ""
    best_fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, result: TrainResult, fields: Mapping[str, Mapping[str, Any]]) -> Self:
        """Returns the result of a sweep from that of its training.

        Args:
            result: result of the training.
            fields: adapter name -> its own fields.
        """
        best = result.state.best_member
        assert best is not None
        values = {item.name: getattr(result, item.name) for item in dataclasses.fields(result)}
        return cls(**values | {"best": best.name, "best_fields": dict(fields[best.name])})

    @property
    def members(self) -> tuple[MemberState, ...]:
        """The final state of each adapter."""
        return self.state.members

    def view(self) -> Block:  # type: ignore[override]
        """Shows the result and the best adapter, and a row for each."""
        first = super().view()
        return Stack((first, members_table(self.state))) if self.shown != "card" else first

    def _parts(self, *, message: bool = True) -> list[str]:
        best = next(member for member in self.members if member.name == self.best)
        loss = best.smoothed_loss if best.eval_loss is None else best.eval_loss
        figure = f"{'loss' if best.eval_loss is None else 'eval loss'} {numbers.loss(loss)}"
        for name in {best.metric, f"eval_{best.metric}"} & best.metrics.keys():  # an objective's keep their prefix
            figure = f"{best.metric} {numbers.metric(best.metrics[name])}"
        _, *others = super()._parts(message=message)
        of_all = ("loss ", "eval loss ", *(f"{name} " for name in self.state.metrics))
        parts = [part for part in others if not part.startswith(of_all)]
        return [
            f"{len(self.members)} adapters {self.status}",
            f"best {self.best} ({figure})",
            *parts,
        ]
