"""Sweeps in a session: in the background, with a stop for each, and what is known of them afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.display.training import training_card
from nbpeft.errors import AdapterError, AdapterExistsError, ConfigError
from nbpeft.session import Session
from nbpeft.sweeps import sweep
from nbpeft.training.sweep.result import SweepResult
from tests.tiny_models import adapted
from tests.training.support import weights

ROWS = [{"input_ids": [1 + (step + start) % 7 for step in range(6)]} for start in range(8)]
CONFIG: dict[str, Any] = {"target_modules": ["q_proj"]}


class Ask(TrainerCallback):
    """Asks the session to stop one adapter, in the middle of the training."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.errors: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            with pytest.raises(
                AdapterError, match=r"'x' is not being trained in a sweep; these are: sql-lr1e-2, sql-lr5e-2"
            ):
                self.session.stop(adapter="x")
            self.session.stop(adapter=self.name)


@pytest.mark.parametrize("background", [False, True])
def test_one_of_a_sweep_is_stopped(background: bool) -> None:
    session, model = Session(), adapted(name="sql")
    session.register(model, name="model")
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


class AskForAClone(TrainerCallback):
    """Asks the session to clone one adapter, in the middle of the training."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.said: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            clone = self.session.clone
            with pytest.raises(
                AdapterError, match="'x' is not being trained in a sweep; these are: sql-lr1e-2, sql-lr5e-2"
            ):
                clone("x", learning_rate=0.1)
            with pytest.raises(ConfigError, match="a clone needs settings of its own, e"):
                clone("sql-lr1e-2")
            with pytest.raises(ConfigError, match="num_train_epochs cannot be a sweep"):
                clone("sql-lr1e-2", num_train_epochs=3)
            with pytest.raises(ConfigError, match="learning_rate must be a number, not 'fast'"):
                clone("sql-lr1e-2", learning_rate="fast")
            with pytest.raises(AdapterExistsError, match="an adapter 'sql' exists already"):
                clone("sql-lr1e-2", "sql", learning_rate=0.1)
            self.said.append(str(clone("sql-lr1e-2", "slow", learning_rate=0.001)))


@pytest.mark.parametrize("background", [False, True])
def test_one_of_a_sweep_goes_on_as_two(background: bool) -> None:
    session, model = Session(), adapted(name="sql")
    session.register(model, name="model")
    ask = AskForAClone(session)
    given: dict[str, Any] = {"learning_rate": sweep(0.01, 0.05), "max_steps": 4, "keep": False, "callbacks": [ask]}
    result = session.train(model, ROWS, background=background, **given)
    result = result.wait(60) if background else result
    assert ask.said == ["training sql-lr1e-2 is cloned after this step as slow (step 1 of 4)"]
    clone = result.state.members[-1]
    assert (clone.name, clone.status, len(clone.history), clone.settings["learning_rate"]) == (
        "slow",
        "finished",
        2,
        "1e-3",
    )
    tracked = session.context.models.get("model")
    assert tracked.steps_of(["slow"])[0] == 4 and tracked.origin_of("slow") == "sql"
    assert result.adapter == "sql-lr1e-2, sql-lr5e-2, slow"


class StopAt(TrainerCallback):
    """Asks the session to stop after a step."""

    def __init__(self, session: Session, step: int) -> None:
        self.session, self.step = session, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.session.control("model").request_stop()


@pytest.mark.parametrize("stop", [1, 3], ids=["before its clone", "with its clone"])
def test_a_run_goes_on_with_its_clones(tmp_path: Path, stop: int) -> None:
    found = []
    for step in (0, stop):
        session, model = Session(), adapted(name="sql")
        session.context.chosen_runs_folder = str(tmp_path / f"{step}")
        session.register(model, name="model")
        given: dict[str, Any] = {"callbacks": [AskForAClone(session), StopAt(session, step)]}
        result = session.train(model, ROWS, learning_rate=sweep(0.01, 0.05), max_steps=4, **given)
        if step:
            assert result.steps == step
            for member in result.state.members:
                session.delete(member.name, model="model")
            result = session.resume(model="model", data=ROWS, callbacks=[AskForAClone(session)]).training
        assert [member.name for member in result.state.members] == ["sql-lr1e-2", "sql-lr5e-2", "slow"]
        found.append([weights(model, member.name) for member in result.state.members])
    for broken, expected in zip(found[1], found[0], strict=True):
        assert all(torch.equal(broken[name], tensor) for name, tensor in expected.items())


def test_a_resumed_sweep_has_the_losses_of_each_adapter_from_its_first_step(tmp_path: Path) -> None:
    found = []
    for stop in (0, 3):
        session, model = Session(), adapted(name="sql")
        session.context.chosen_runs_folder = str(tmp_path / f"{stop}")
        session.register(model, name="model")
        given: dict[str, Any] = {"callbacks": [Ask(session, "sql-lr1e-2"), StopAt(session, stop)]}
        result = session.train(model, ROWS, learning_rate=sweep(0.01, 0.05), max_steps=4, **given)
        if stop:
            for member in result.state.members:
                session.delete(member.name, model="model")
            result = session.resume(model="model", data=ROWS, callbacks=[]).training
        found.append([(one.status, one.step, one.loss, one.history) for one in result.state.members])
    assert [(status, len(history)) for status, _, _, history in found[0]] == [("stopped", 2), ("finished", 4)]
    assert found[1] == found[0]


def test_a_resumed_sweep_knows_from_which_adapter_it_started(tmp_path: Path) -> None:
    """That one does not come back: a sweep that is repeated says how to go on, and makes no names of its own."""
    for step in (2, 0):
        session, model = Session(), adapted(name="sql")
        session.context.chosen_runs_folder = str(tmp_path)
        session.register(model, name="model")
        if step:
            session.train(model, ROWS, learning_rate=sweep(0.01, 0.05), max_steps=4, callbacks=[StopAt(session, step)])
    session.delete("sql")
    assert session.resume(model="model", data=ROWS, callbacks=[]).training.steps == 4
    names = model.manager.names
    again: dict[str, Any] = {"learning_rate": sweep(0.01, 0.02), "max_steps": 1}
    for adapter in (None, "sql"):
        told = r"'sql', from which the sweep of sql-lr1e-2, sql-lr5e-2 started, is not on the model: .* adapter='sql-lr"
        with pytest.raises(AdapterError, match=told):
            session.train(model, ROWS, adapter=adapter, **again)
        assert model.manager.names == names
    session.add(model, CONFIG, name="sql")
    result = session.train(model, ROWS, **again)
    assert [member.name for member in result.state.members] == ["sql-lr1e-2", "sql-lr2e-2"]


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
    session.register(model, name="model")
    session.add(model, CONFIG | {"r": sweep(2, 4)}, name="codes")
    result = session.train(model, ROWS, max_steps=2, keep=False)
    tracked = session.context.models.get("model")
    assert [tracked.steps_of([member.name])[0] for member in result.state.members] == [2, 2]
    assert session.train(model, ROWS, max_steps=1, keep=False).adapter == result.best


def test_a_sweep_that_is_stopped_before_a_loss_names_no_best() -> None:
    session, model = Session(), adapted(name="sql")
    session.register(model, name="model")
    result = session.train(model, ROWS, learning_rate=sweep(0.01, 0.05), max_steps=1, keep=False)
    assert isinstance(result, SweepResult) and result.best and result.best_fields
    members = tuple(replace(member, loss=None, smoothed_loss=None, step=0) for member in result.members)
    stopped = SweepResult.of(replace(result, state=replace(result.state, members=members), best="", best_fields={}), {})
    assert (stopped.best, stopped.best_fields) == ("", {})
    for text in (str(stopped), repr(training_card(stopped.state))):
        assert "best" not in text
