"""What is known about one run, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbpeft.state import Curve

CRASHED = "crashed"
"""Status of a run whose process ended without saying so."""


@dataclass(frozen=True)
class RunRecord:
    """One run of a place.

    Attributes:
        name: of its folder.
        path: of its folder.
        adapter: what it trained.
        model: variable that held the model, or the empty string.
        status: ``running``, ``finished``, ``stopped``, ``failed`` or ``crashed`` (its process is gone).
        step: optimizer steps done.
        total_steps: steps planned, or None.
        loss: of the last step.
        eval_loss: of the last evaluation.
        best_loss: the lowest evaluation loss.
        best_step: step of that.
        seconds: time spent, without pauses.
        started: when, in seconds since 1970.
        settings: of the adapter and of training.
        message: why it ended, or a warning.
        kept_steps: steps that a state is kept of, the last one first.
    """

    name: str
    path: str
    adapter: str
    model: str
    status: str
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    best_loss: float | None
    best_step: int | None
    seconds: float
    started: float
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    message: str = ""
    kept_steps: tuple[int, ...] = ()

    @property
    def at(self) -> str:
        """``step 40 of 60``."""
        return f"step {self.step:,}" + (f" of {self.total_steps:,}" if self.total_steps else "")


def record_of(
    name: str, path: str, facts: Mapping[str, Any], *, running: bool, kept_steps: Iterable[int]
) -> RunRecord | None:
    """The record in what a ``run.json`` holds; None where that is not one."""
    try:
        status = str(facts["status"])
        return RunRecord(
            name=name,
            path=path,
            adapter=str(facts["adapter"]),
            model=str(facts.get("model") or ""),
            status=CRASHED if status == "running" and not running else status,
            step=int(facts.get("step") or 0),
            total_steps=_whole(facts.get("total_steps")),
            loss=_number(facts.get("loss")),
            eval_loss=_number(facts.get("eval_loss")),
            best_loss=_number(facts.get("best_loss")),
            best_step=_whole(facts.get("best_step")),
            seconds=float(facts.get("seconds") or 0.0),
            started=float(facts.get("started") or 0.0),
            settings=dict(facts.get("settings") or {}),
            message=str(facts.get("message") or ""),
            kept_steps=tuple(kept_steps),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def differing(records: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """Setting -> its value in each run (None where it has none), for the settings that are not the same in all."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    values = {name: tuple(record.settings.get(name) for record in records) for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def curve_of(entries: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """The (step, value) pairs of one value in what was logged."""
    pairs = ((entry.get("step"), entry.get(key)) for entry in entries)
    return tuple(
        (step, float(value)) for step, value in pairs if isinstance(step, int) and isinstance(value, int | float)
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int) else None
