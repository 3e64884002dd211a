"""The result of a sweep, for the output of a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from nbpeft.display import numbers
from nbpeft.display.blocks import Block, Stack
from nbpeft.display.training import headline_words, members_table
from nbpeft.state import MemberState
from nbpeft.training.monitor.result import TrainResult


@dataclass(frozen=True, repr=False)
class SweepResult(TrainResult):
    """The result of training several adapters; values other than ``members`` are for all of them together.

    Attributes:
        best: the adapter with the best score or value of ``metric_for_best_model``, else with the lowest evaluation
            loss, or training loss if there was no evaluation. It is active. Empty if each adapter had its own rows.
        best_fields: its own fields of ``TrainingArguments``.
    """

    best: str = ""
    best_fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, result: TrainResult, fields: Mapping[str, Mapping[str, Any]]) -> Self:
        """Returns the result of a sweep from that of its training."""
        best = result.state.best_member
        values = {item.name: getattr(result, item.name) for item in dataclasses.fields(result)}
        if best is not None:
            values |= {"best": best.name, "best_fields": dict(fields[best.name])}
        return cls(**values)

    @property
    def members(self) -> tuple[MemberState, ...]:
        """The final state of each adapter."""
        return self.state.members

    def view(self) -> Block:  # type: ignore[override]
        """Shows the result and the best adapter, and a row for each."""
        first = super().view()
        return Stack((first, members_table(self.state))) if self.shown != "card" else first

    def _parts(self, *, message: bool = True) -> list[str]:
        shown = [
            f"{member.name} ({', '.join((*headline_words(self.state, member), _figure(member)))})"
            for member in self.members
            if self.best in (member.name, "")
        ]
        _, *others = super()._parts(message=message)
        of_all = ("loss ", "eval loss ", *(f"{name} " for name in self.state.metrics))
        parts = [part for part in others if not part.startswith(of_all)]
        return [
            f"{len(self.members)} adapters {self.status}",
            f"{'best ' if self.best else ''}{', '.join(shown)}",
            *parts,
        ]


def _figure(member: MemberState) -> str:
    """Returns the figure by which an adapter is ranked, as text."""
    for name in {member.metric, f"eval_{member.metric}"} & member.metrics.keys():  # an objective's keep their prefix
        return f"{member.metric} {numbers.metric(member.metrics[name])}"
    loss = member.smoothed_loss if member.eval_loss is None else member.eval_loss
    return f"{'loss' if member.eval_loss is None else 'eval loss'} {numbers.loss(loss)}"
