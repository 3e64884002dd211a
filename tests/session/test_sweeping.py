"""Sweeps in a session: in the background, with a stop for each, and what is known of them afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from nbpeft.errors import AdapterError
from nbpeft.session import Session
from nbpeft.sweeps import sweep
from tests.tiny_models import adapted

ROWS = [{"input_ids": [1 + (step + start) % 7 for step in range(6)]} for start in range(8)]
CONFIG: dict[str, Any] = {"target_modules": ["q_proj"]}


class Ask(TrainerCallback):
    """Asks the session to stop one adapter, in the middle of the training."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.errors: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            with pytest.raises(AdapterError, match=r"'x' does not learn beside others now; sql-lr1e-2, sql-lr5e-2 do"):
                self.session.stop(adapter="x")
            self.session.stop(adapter=self.name)


@pytest.mark.parametrize("background", [False, True])
def test_one_of_a_sweep_is_stopped(background: bool) -> None:
    session, model = Session(), adapted(name="sql")
    session.watch(model, name="model")
    result = session.train(
        model,
        ROWS,
        learning_rate=sweep(0.01, 0.05),
        max_steps=4,
        keep=False,
        background=background,
        callbacks=[Ask(session, "sql-lr1e-2")],
    )
    result = result.wait(60) if background else result
    assert [(member.status, member.step) for member in result.state.members] == [("stopped", 2), ("finished", 4)]
    assert session.result("model").best in ("sql-lr1e-2", "sql-lr5e-2")
    assert model.active_adapters == [session.result("model").best]


def test_a_failed_sweep_of_configs_leaves_a_bare_model_bare() -> None:
    from nbpeft.errors import NbpeftError
    from tests.tiny_models import llama, state

    session, model = Session(), llama()
    before = state(model)
    with pytest.raises(NbpeftError):
        session.add(model, {"r": sweep(2, 4), "target_modules": sweep(["q_proj"], ["nothing"])}, name="codes")
    assert state(model).keys() == before.keys()
    assert not session.names


def test_steps_are_counted_for_each_and_the_next_training_is_of_the_best() -> None:
    session, model = Session(), adapted(name="sql")
    session.watch(model, name="model")
    session.add(model, CONFIG | {"r": sweep(2, 4)}, name="codes")
    result = session.train(model, ROWS, max_steps=2, keep=False)
    tracked = session.context.models.get("model")
    assert [tracked.steps_of([member.name])[0] for member in result.state.members] == [2, 2]
    assert session.train(model, ROWS, max_steps=1, keep=False).adapter == result.best
