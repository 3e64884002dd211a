"""Training in the background: what others may do meanwhile, and that it learns what it would have learned alone."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.errors import AdapterError, BusyError, NbpeftError
from nbpeft.scoring.score import score
from nbpeft.session import Session
from nbpeft.session.background import BackgroundRun, BackgroundTraining
from nbpeft.training.watching.generation import evaluating
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama

ROWS = [{"input_ids": [1 + (step + start) % 7 for step in range(12)]} for start in range(16)]
STEPS = 12
FIELDS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
}


class Gate(TrainerCallback):
    """Lets a training do its steps when the test says so."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.began = threading.Event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.set()
        assert self.allowed.acquire(timeout=60)

    def open(self) -> None:
        """Lets all steps go."""
        self.allowed.release(10_000)


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


def adapted(session: Session) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3}
    return session.add(llama(), settings, name="sql", variable="model").model


@pytest.fixture
def model(session: Session) -> Any:
    return adapted(session)


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def begin(session: Session, model: Any, **fields: Any) -> tuple[BackgroundRun, Gate]:
    """A training that waits at the beginning of its first step."""
    gate = Gate()
    run = session.train(model, ROWS, background=True, callbacks=[gate], **{**FIELDS, **fields})
    assert isinstance(run, BackgroundRun)
    assert gate.began.wait(60)
    return run, gate


def elsewhere(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Does something in another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def test_it_learns_what_it_learns_in_the_cell(session: Session, model: Any) -> None:
    expected = session.train(model, ROWS, **FIELDS)
    learned = weights(model)

    other = Session()
    again = adapted(other)
    run, gate = begin(other, again)
    ids = torch.arange(9)[None]
    modes = []

    def use_it() -> None:
        with torch.enable_grad():
            output = again(input_ids=ids).logits
        with again.manager.active_state.hold():  # between two steps, and not two times between two of them
            same = torch.equal(again(input_ids=ids).logits, again(input_ids=ids).logits)
        modes.append((output.requires_grad, same))
        again.generate(input_ids=ids, do_sample=True, max_new_tokens=4)
        other.ask("Ana", tokenizer=CharTokenizer(), temperature=1.0, max_new_tokens=4)
        other.compare("Ana", max_new_tokens=3)

    thread, done = elsewhere(lambda: [use_it() for _ in range(2)])
    for _ in range(4):
        gate.allowed.release()
        thread.join(0.1)
    gate.open()
    result = run.wait(60)
    assert (result.steps, result.loss) == (expected.steps, expected.loss)
    assert result.state.history == expected.state.history
    assert all(map(torch.equal, learned, weights(again)))
    thread.join(60)
    assert done and modes and all(same for _, same in modes), "no dropout in what others compute"
    assert again.training is model.training is False
    other.close()


def test_others_compute_between_steps_alone(session: Session, model: Any) -> None:
    run, gate = begin(session, model)
    thread, results = elsewhere(lambda: model(input_ids=torch.arange(9)[None]).logits.requires_grad)
    thread.join(0.3)
    assert thread.is_alive(), "a step runs"
    gate.allowed.release()
    thread.join(60)
    assert results == [False]
    assert run.running and run.state is not None and run.state.step <= 1
    gate.open()
    run.wait(60)


def test_threads_that_never_pause_leave_it_its_steps_and_its_stop(session: Session, model: Any) -> None:
    run, gate = begin(session, model)
    ended = threading.Event()

    def call() -> None:
        while not ended.is_set():
            model(input_ids=torch.arange(9)[None])

    threads = [elsewhere(call)[0] for _ in range(3)]
    session.stop()
    gate.open()
    assert run.wait(60).steps == 1
    run, gate = begin(session, model)
    gate.open()
    assert run.wait(120).steps == STEPS
    ended.set()
    for thread in threads:
        thread.join(60)


def test_scoring_leaves_its_dropout_on(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[object] = []
    monkeypatch.setattr(model, "eval", lambda: switched.append(model))
    run, gate = begin(session, model)
    rows, tokenizer = [{"prompt": "Ana", "completion": "x"}], CharTokenizer()
    thread, done = elsewhere(lambda: score(model, rows, tokenizer=tokenizer, max_new_tokens=1, progress=False))
    thread.join(0.2)
    assert thread.is_alive(), "it waits for the end of the step"
    gate.open()
    assert run.wait(60).steps == STEPS
    thread.join(60)
    assert [result.status for result in done] == ["finished"] and not switched


def test_it_goes_on_after_a_block_that_was_never_left(session: Session, model: Any) -> None:
    run, gate = begin(session, model)
    entered = [evaluating(model)]
    thread, _ = elsewhere(lambda: entered[0].__enter__())
    gate.open()
    assert run.wait(60).steps == STEPS
    thread.join(60)
    entered.clear()


def test_while_it_is_paused_others_compute(session: Session, model: Any) -> None:
    run, gate = begin(session, model)
    session.pause()
    gate.open()
    answer = session.ask("Ana", tokenizer=CharTokenizer(), max_new_tokens=4)
    assert answer.status == "finished"
    assert run.state is not None and run.state.step == 1
    assert session.ask("Ana", max_new_tokens=4).text == answer.text
    session.resume()
    assert run.wait(60).steps == STEPS


def test_what_it_has_learned_can_be_shipped_between_steps(session: Session, model: Any, tmp_path: Path) -> None:
    run, gate = begin(session, model)
    session.pause()
    gate.open()
    assert session.ship(engine="vllm", to=tmp_path / "adapter").written
    assert session.ship(engine="transformers", merged=True, to=tmp_path / "merged").written
    assert run.state is not None and run.state.step == 1
    session.resume()
    assert run.wait(60).steps == STEPS


def test_what_would_disturb_it_is_refused_at_once(session: Session, model: Any) -> None:
    run, gate = begin(session, model)
    refused: list[Callable[[], Any]] = [
        lambda: session.use("sql"),
        lambda: session.use("base"),
        lambda: session.delete("sql"),
        lambda: session.rename("sql", "b"),
        lambda: session.copy("sql", "b"),
        lambda: session.scale("sql", 2.0),
        lambda: session.freeze("sql"),
        lambda: session.merge(),
        lambda: session.unload(),
        lambda: session.add(model, {"r": 2, "target_modules": ["q_proj"]}, name="b"),
        lambda: session.train(model, ROWS, max_steps=1),
        lambda: session.start_run(model),
        lambda: session.try_combination({"sql": 0.5}, "Ana", tokenizer=CharTokenizer()),
        lambda: session.swap("somewhere"),
        lambda: model.set_adapter("sql"),
        lambda: model.delete_adapter("sql"),
        lambda: model.merge_and_unload(),
    ]
    for command in refused:
        with pytest.raises(BusyError, match=r"^busy: training sql; try again when it has finished, or stop it$"):
            command()
    model.train()  # of no effect
    with model.disable_adapter():
        pass
    assert model.active_adapters == ["sql"]
    gate.open()
    assert run.wait(60).steps == STEPS
    session.use("sql")


def test_another_model_can_be_adapted_meanwhile(session: Session, model: Any) -> None:
    run, gate = begin(session, model)
    other = session.add(llama(), {"r": 2, "target_modules": ["q_proj"]}, name="b", variable="other").model
    session.delete("b", model=other)
    with pytest.raises(BusyError, match="busy: training sql"):
        session.train(other, ROWS, max_steps=1)
    with warnings.catch_warnings(record=True):
        assert session.state.model("other") is not None
    gate.open()
    run.wait(60)


def test_it_is_stopped_by_word_and_has_a_result(session: Session, model: Any) -> None:
    with pytest.raises(AdapterError, match="no training is running: there is nothing to stop"):
        session.stop()
    run, gate = begin(session, model)
    with pytest.raises(AdapterError, match="training sql is still running: it has no result yet"):
        session.result()
    with pytest.raises(AdapterError, match="no training of 'x' is running, but one of model"):
        session.stop("x")
    with pytest.raises(TimeoutError, match="training sql is still running"):
        run.wait(0)
    assert run.result is None and "session.stop()" in str(run)
    assert str(session.stop("model")) == f"training sql stops after the current step (step 0 of {STEPS})"
    gate.open()
    result = run.wait(60)
    assert (result.status, result.steps) == ("stopped", 1)
    assert run.result is result is session.result(model)
    assert not run.running and str(run) == str(result)
    assert model.manager.active_state.gate is None
    again, gate = begin(session, model)
    session.pause()
    with pytest.raises(AdapterError, match="training sql is paused: resume or stop it before waiting"):
        session.result(wait=True)
    session.resume()
    gate.open()
    assert session.result(wait=True).steps == STEPS
    assert again.result is session.result() is session.result(wait=True)


def test_what_fails_before_the_first_step_fails_in_the_cell(session: Session, model: Any) -> None:
    before = weights(model)
    for data, fields, words in (
        (ROWS, {"learning_rat": 1}, "learning_rat"),
        ([{"x": 1}], {}, "Expected columns"),
        (ROWS, {"optim": "fast"}, "optim"),
    ):
        with pytest.raises(NbpeftError, match=words):
            session.train(model, data, background=True, **fields)
        assert model.manager.active_state.gate is None
    assert all(map(torch.equal, before, weights(model)))
    session.use("sql")


@pytest.mark.parametrize("place", ["before its thread", "at its thread", "before it is shown"])
def test_one_that_cannot_begin_keeps_nothing_busy(
    session: Session, model: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "before its thread":
            patch.setattr(BackgroundTraining, "start", fails)
        elif place == "at its thread":
            patch.setattr(threading.Thread, "start", fails)
        else:
            patch.setattr(session.context.run_subscribers, "notify", fails)
        with pytest.raises(KeyboardInterrupt):
            session.train(model, ROWS, background=True, **FIELDS)
    assert model.manager.active_state.gate is None
    session.use("sql")
    session.context.refuse_another_training()


class Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise ValueError("the disk is full")


def test_an_error_is_in_the_state_and_in_the_result(session: Session, model: Any) -> None:
    run = session.train(model, ROWS, background=True, callbacks=[Breaks()], **FIELDS)
    assert isinstance(run, BackgroundRun)
    with pytest.raises(ValueError, match="the disk is full"):
        run.wait(60)
    with pytest.raises(ValueError, match="the disk is full"):
        assert run.result
    with pytest.raises(ValueError, match="the disk is full"):
        session.result()
    assert run.state is not None and run.state.status == "failed" and "the disk is full" in run.state.message
    assert "on_step_end" in run.training.traceback
    assert "training sql failed: the disk is full" in str(run)
    result = session.train(model, ROWS, **{**FIELDS, "max_steps": 1})
    assert session.result() is result, "the last one is that of the cell"


def test_closing_the_session_ends_it(model: Any) -> None:
    session = Session()
    run, gate = begin(session, model)
    gate.open()
    session.close()
    assert not run.running
    result = run.result
    assert result is not None and result.status == "stopped" and "the session was closed" in result.message


def test_it_keeps_no_model_alive(session: Session) -> None:
    model = adapted(session)
    reference = weakref.ref(model)
    run, gate = begin(session, model)
    gate.open()
    run.wait(60)
    failed = session.train(model, ROWS, background=True, callbacks=[Breaks()], **FIELDS)
    with pytest.raises(ValueError, match="disk"):
        failed.wait(60)  # type: ignore[union-attr]
    del model, gate
    gc.collect()
    assert reference() is None


def test_states_are_published_to_the_end(session: Session, model: Any) -> None:
    seen: list[Any] = []
    session.subscribe(seen.append)
    started: list[tuple[Any, str, str]] = []
    session.on_run(lambda run, name: started.append((run, name, threading.current_thread().name)))
    run, gate = begin(session, model)
    assert [(name, thread) for _, name, thread in started] == [("model", threading.current_thread().name)]
    gate.open()
    run.wait(60)
    last = seen[-1].model("model").training
    assert last.status == "finished" and seen[-1].busy == ""
    assert session.state.model("model").training.status == "finished"  # type: ignore[union-attr]
