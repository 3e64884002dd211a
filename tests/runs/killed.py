"""Trainings of a session that are killed, in processes forked for it, and what they would have been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nbpeft.session import Session
from nbpeft.training import Run
from tests.faults.killing import die, forked
from tests.tiny_models import llama
from tests.training.support import token_rows, weights

ARGUMENTS: dict[str, Any] = {
    "max_steps": 14,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "seed": 7,
}
"""Two epochs and a half of 24 rows."""
LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}


def session_in(place: Path) -> Session:
    session = Session()
    session.context.chosen_runs_folder = str(place)
    return session


def adapted_session(place: Path) -> tuple[Session, Any]:
    """A session with an adapter ``sql`` on a tiny model, always with the same weights."""
    session = session_in(place)
    base = llama()
    torch.manual_seed(11)
    return session, session.add(base, LORA, name="sql", variable="model").model


def rows() -> list[dict[str, Any]]:
    return token_rows(24)


def train_and_die(place: Path, step: int, prepare: Callable[[], object] = lambda: None, **arguments: Any) -> bool:
    """Trains in a forked process that dies after a step. Returns whether it was killed."""

    def act() -> None:
        prepare()
        session, model = adapted_session(place)
        session.on_run(lambda run, name: when_noted(run, step, die))
        session.train(model, rows(), **ARGUMENTS | arguments)

    return forked(act)


def when_noted(run: Run, step: int, act: Callable[[], object]) -> None:
    """Does something once, when the loss of a step was noted."""
    record: Any = run.record

    def recording(at: int, **values: Any) -> None:
        record(at, **values)
        if at >= step and "loss" in values:
            watched.record = record
            act()

    watched: Any = run
    watched.record = recording


def unbroken(place: Path, **arguments: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result and the weights of a run that nothing broke off."""
    session, model = adapted_session(place)
    result = session.train(model, rows(), **ARGUMENTS | arguments)
    return result, weights(model, "sql")
