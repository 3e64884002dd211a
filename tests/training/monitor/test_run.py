from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import signal
import threading
import time
import weakref
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nbpeft.display.html import to_html
from nbpeft.display.training import small_curves, training_card, training_text
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import ConfigError, TrainingError, TrainingInterrupted
from nbpeft.model import PeftModel
from nbpeft.state import MemoryPart, MemoryState, Sample, TrainState
from nbpeft.training.adapters.learning_check import LearningCheck
from nbpeft.training.monitor import memory_meter
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.record import Record
from nbpeft.training.monitor.run import Run, start_run
from tests.tiny_models import llama
from tests.training.support import Clock, trainable
from tests.waiting import PATIENCE


class Loop:
    """A loop that trains one linear layer."""

    def __init__(self, rate: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)

    def one(self) -> torch.Tensor:
        loss = self.model(torch.ones(2, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def test_a_loop_from_start_to_end():
    loop = Loop()
    states: list[TrainState] = []
    with start_run(loop.model, total_steps=5, publish=states.append) as run:
        for step in range(5):
            run.step(loop.one(), learning_rate=0.1, tokens=6, epoch=(step + 1) / 5)
    state = run.state
    assert (state.status, state.step, state.total_steps) == ("finished", 5, 5)
    assert state.epoch == 1.0 and state.learning_rate == 0.1
    assert [step for step, _ in state.history] == [1, 2, 3, 4, 5]
    assert state.history[-1][1] == state.loss and state.loss < state.history[0][1]
    assert state.message == "" and run.token_count == 30 and state.tokens_per_second
    assert states[0].status == "running" and states[-1] == state
    json.dumps(asdict(state))


def test_metrics_of_a_loop_of_ones_own_are_kept_drawn_and_listed():
    loop = Loop()
    with start_run(loop.model, total_steps=3) as run:
        for step in range(3):
            hits = torch.tensor([float(step)], requires_grad=True)
            run.step(loop.one(), gradient_norm=2.0, accuracy=step / 4, hits=hits, reward=np.float32(step), lost=True)
    state = run.state
    assert state.metrics == {"accuracy": 0.5, "hits": 2.0, "reward": 2.0, "lost": 1.0} and state.gradient_norm == 2.0
    assert state.metric_history["accuracy"] == ((1, 0.0), (2, 0.25), (3, 0.5))
    assert {name for name, *_ in small_curves(state)} >= {"accuracy", "hits", "reward", "gradient norm"}
    shown = to_html(training_card(state))
    assert "accuracy" in shown and "hits" in shown and "accuracy 0.5" in training_text(state)
    json.dumps(asdict(state))


@pytest.mark.parametrize("name", ["eval_loss", "memory", "learning rate", "gradient norm", "tokens/s", "accuracy"])
def test_metrics_that_are_none_are_refused_in_one_line(name: str):
    loop = Loop()
    words = {"eval_loss": "run.evaluated", "accuracy": "must be a number or a tensor with one element, not a Tensor"}
    with start_run(loop.model, total_steps=3) as run:
        value = torch.zeros(2) if name == "accuracy" else 1.0
        with pytest.raises(ConfigError, match=words.get(name, "every run has a curve of this name")):
            run.step(loop.one(), **{name: value})
        with pytest.raises(ConfigError, match=r"metric 'accuracy' must be a number .* not a str"):
            run.step(loop.one(), accuracy="good")
    assert run.state.step == 0 and run.state.metrics == {}


def test_publishing_is_throttled_and_the_last_state_always_arrives():
    loop, clock = Loop(), Clock()
    states: list[TrainState] = []
    with start_run(loop.model, 100, publish=states.append, clock=clock) as run:
        for _ in range(100):
            clock.advance(0.01)
            run.step(loop.one())
    assert 5 <= len(states) <= 2 + 1.0 / Run.interval
    assert states[-1].step == 100 and states[-1].status == "finished"


def test_pace_and_time_left():
    loop, clock = Loop(), Clock()
    with start_run(loop.model, 100, clock=clock) as run:
        for _ in range(50):
            clock.advance(2.0)
            run.step(loop.one(), tokens=torch.tensor(10))
        state = run.state
        assert state.elapsed == 100.0
        assert state.remaining == pytest.approx(100.0)
        assert state.tokens_per_second == pytest.approx(5.0)
    assert run.state.remaining is None


def test_the_speed_has_no_spike_at_the_first_step():
    """A Trainer counts the tokens of a batch before its step, which takes seconds: they are no speed yet."""
    loop, clock, seen = Loop(), Clock(), []
    with start_run(loop.model, 100, clock=clock, publish=lambda state: seen.append(state.tokens_per_second)) as run:
        for step in range(1, 6):
            clock.advance(0.3)
            run.record(0, tokens=torch.tensor(20))
            clock.advance(1.7)
            run.record(step, loss=loop.one())
        speeds = [*filter(None, seen), *(value for _, value in run.state.series["tokens/s"])]
        assert seen[:2] == [None, None] and len(speeds) > 8 and speeds == [pytest.approx(10.0)] * len(speeds)
        run.record(0, tokens=20)
        assert run.token_count == 120, "with those of a step that is not done"


def test_losses_stay_tensors_until_they_are_published(monkeypatch):
    loop, clock = Loop(), Clock()
    transfers = []
    to_list = torch.Tensor.tolist

    def counted(self):
        transfers.append(1)
        return to_list(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with start_run(loop.model, 50, clock=clock) as run:
        for _ in range(50):
            run.step(loop.one())
        assert transfers == []
        assert len(run.state.history) == 50
        assert transfers == [1]


def test_stop_from_another_thread_ends_the_block():
    loop, after = Loop(), []
    with start_run(loop.model, 10_000) as run:
        threading.Timer(0.1, run.control.request_stop, ["had enough"]).start()
        for _ in range(10_000):
            run.step(loop.one())
            time.sleep(0.001)
        after.append("end of loop")
    assert after == []
    state = run.state
    assert state.status == "stopped" and 0 < state.step < 10_000
    assert state.message == f"stopped at step {state.step}: had enough"


def test_stop_is_not_swallowed_by_the_loops_own_handler():
    loop = Loop()
    with start_run(loop.model, 10) as run:
        run.control.request_stop()
        for _ in range(10):
            try:
                run.step(loop.one())
            except Exception:
                pytest.fail("StopRun must not be an Exception")
    assert run.state.status == "stopped" and run.state.step == 1


def test_stop_asked_for_in_the_last_step_is_a_finished_run():
    loop = Loop()
    with pytest.MonkeyPatch.context(), start_run(loop.model, 2) as run:
        run.step(loop.one())
        run.record(2, loss=loop.one())
        run.control.request_stop()
    assert run.state.status == "finished"


def test_pause_and_resume_do_not_count_as_time():
    loop, clock, control = Loop(), Clock(), RunControl()
    states: list[TrainState] = []
    pauses = iter([False, False, True])

    def poll():
        if control.paused:
            clock.advance(1000.0)
            control.resume()
        elif next(pauses, False):
            control.pause()

    control.deliver_clicks = poll
    with start_run(loop.model, 10, control=control, publish=states.append, clock=clock) as run:
        for _ in range(10):
            clock.advance(1.0)
            run.step(loop.one())
    assert "paused" in [state.status for state in states]
    assert run.state.elapsed == 10.0 and run.state.status == "finished"


def test_status_says_stopping_before_the_step_ends():
    loop = Loop()
    with start_run(loop.model, 10) as run:
        seen = [run.state.status]
        run.control.pause()
        seen.append(run.state.status)
        run.control.request_stop()
        seen.append(run.state.status)
    assert seen == ["running", "pausing", "stopping"]


def test_keyboard_interrupt_ends_the_block():
    """In order, and then it goes on as an interruption: what comes after the block does not run."""
    loop = Loop()
    with pytest.raises(TrainingInterrupted, match="stopped at step 1"), start_run(loop.model, 10) as run:
        run.step(loop.one())
        raise KeyboardInterrupt
    assert run.state.status == "stopped" and run.interrupted
    assert run.state.message == "stopped at step 1"


def test_a_second_interruption_waits_until_the_end_is_published():
    loop, states = Loop(), []

    def publish(state: TrainState) -> None:
        if state.status == "stopped":
            signal.raise_signal(signal.SIGINT)
        states.append(state.status)

    with pytest.raises(KeyboardInterrupt), start_run(loop.model, 10, publish=publish) as run:
        run.step(loop.one())
        raise KeyboardInterrupt
    assert states[-1] == run.state.status == "stopped"


def test_real_errors_pass_and_let_go_of_tensors():
    loop, kept = Loop(), []

    def fails():
        activations = torch.zeros(1000)
        kept.append(weakref.ref(activations))
        raise ValueError("bad row\nsecond line")

    with pytest.raises(ValueError, match="bad row") as caught, start_run(loop.model, 10) as run:
        run.step(loop.one())
        fails()
    assert run.state.status == "failed"
    assert run.state.message == "ValueError: bad row"
    gc.collect()
    assert caught.value is not None and kept[0]() is None


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), "failed"), (KeyboardInterrupt(), "stopped")])
def test_a_run_that_cannot_begin_has_ended(error, status, monkeypatch):
    def failing(check):
        raise error

    monkeypatch.setattr(LearningCheck, "before", failing)
    loop, states = Loop(), list[TrainState]()
    with pytest.raises((MemoryError, TrainingInterrupted)), start_run(loop.model, 3, publish=states.append):
        pytest.fail("the block runs")
    assert states[-1].status == status
    assert not any(parameter._post_accumulate_grad_hooks for parameter in loop.model.parameters())


def test_another_runs_stop_passes_through():
    loop = Loop()
    with start_run(loop.model, 10) as outer:
        with start_run(loop.model, 10) as inner:
            outer.control.request_stop()
            outer.step(loop.one())
        pytest.fail("the outer block had to end")
    assert outer.state.status == "stopped" and inner.state.status == "failed"


def test_a_run_begins_once():
    loop = Loop()
    with start_run(loop.model, 3) as run:
        run.begin(total_steps=4)
        assert [len(parameter._post_accumulate_grad_hooks) for parameter in loop.model.parameters()] == [1, 1]
    assert run.state.total_steps == 4


def test_step_outside_the_block_is_an_error():
    loop = Loop()
    with pytest.raises(TrainingError, match="with start_run"):
        start_run(loop.model, 10).step(1.0)


def test_a_failing_display_warns_once_and_training_goes_on():
    loop = Loop()

    def publish(state):
        raise RuntimeError("no front end")

    with (
        pytest.warns(UserWarning, match="display of this run") as caught,
        start_run(loop.model, 3, publish=publish) as run,
    ):
        for _ in range(3):
            run.step(loop.one())
    assert run.state.status == "finished"
    assert len(caught) == 1


def test_evaluation_and_nan():
    loop = Loop()
    with pytest.warns(UserWarning, match="NaN since step 2"), start_run(loop.model) as run:
        run.step(loop.one())
        run.evaluated(torch.tensor(0.5))
        run.step(float("nan"))
        run.evaluated(0.25, step=2)
        assert run.state.remaining is None
    state = run.state
    assert (state.eval_loss, state.eval_step) == (0.25, 2)
    assert state.eval_history == ((1, 0.5), (2, 0.25))
    assert len(state.history) == 1 and "lower learning rate" in state.message


def test_the_run_does_not_keep_the_model():
    loop = Loop()
    with start_run(loop.model, 1) as run:
        run.step(loop.one())
    model = weakref.ref(loop.model)
    del loop
    gc.collect()
    assert model() is None and run.state.status == "finished"


def test_a_run_that_is_dropped_before_its_end_no_longer_watches(monkeypatch):
    seen: list[int] = []
    model = trainable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[1, 2, 3, 4]])
    monkeypatch.setattr(AdapterManager, "after_backward", lambda self, step: seen.append(step))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    run = start_run(model, 3)
    run.begin()
    step()
    assert seen == [0]
    del run
    gc.collect()
    step()
    assert seen == [0]


def test_many_threads_may_ask_for_the_state():
    loop, errors, done = Loop(), [], threading.Event()

    def ask(run):
        try:
            while not done.is_set():
                assert run.state.step >= 0
        except Exception as error:
            errors.append(error)

    with start_run(loop.model, 300) as run:
        threads = [threading.Thread(target=ask, args=(run,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            run.step(loop.one())
        done.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert errors == [] and 120 <= len(run.state.history) <= 480


@pytest.fixture
def measuring_takes_no_time(monkeypatch):
    """Or a busy machine makes a measurement so long that the next one is due later."""
    monkeypatch.setattr(memory_meter, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def test_memory_is_measured_now_and_then(measuring_takes_no_time):
    loop, clock, count = Loop(), Clock(), []

    def measure():
        count.append(1)
        return MemoryState("cpu", (), None, None)

    with start_run(loop.model, 100, clock=clock, memory=measure) as run:
        for _ in range(100):
            clock.advance(0.1)
            run.step(loop.one())
    assert 15 <= len(count) <= 22
    assert run.state.memory == MemoryState("cpu", (), None, None)


def test_the_last_state_has_the_last_measurement_of_memory():
    loop, clock, sizes = Loop(), Clock(), itertools.count(100)
    states: list[TrainState] = []

    def measure():
        return MemoryState("cpu", (MemoryPart("base weights", next(sizes)),), None, None)

    with start_run(loop.model, 10, clock=clock, memory=measure, publish=states.append) as run:
        for _ in range(10):
            clock.advance(0.1)
            run.step(loop.one())
    last = states[-1].memory
    assert last is not None and states[-1].series["memory"][-1] == (10, last.parts[0].byte_count)


def test_a_tick_measures_memory_while_a_step_takes_long(measuring_takes_no_time):
    clock, count = Clock(), []

    def measure():
        count.append(1)
        return MemoryState("cpu", (), None, len(count))

    with start_run(nn.Linear(3, 1), 10, clock=clock, memory=measure) as run:
        before = len(count)
        clock.advance(20.0)
        state = run.tick()
        assert len(count) == before + 1 and state is not None
        assert state.memory == MemoryState("cpu", (), None, len(count))
        assert run.tick() is not None and len(count) == before + 1


def test_a_tick_moves_the_clock_and_nothing_else():
    loop, clock = Loop(), Clock()
    states: list[TrainState] = []
    with start_run(loop.model, 10, clock=clock, publish=states.append) as run:
        for _ in range(2):
            clock.advance(20.0)
            run.step(loop.one())
        count, before = len(states), run.tick()
        clock.advance(5.0)
        run.control.pause()
        after = run.tick()
        assert before is not None and after is not None
        assert (after.elapsed - before.elapsed, before.remaining, after.remaining) == (5.0, 160.0, 155.0)
        assert (before.status, after.status, after.step) == ("running", "pausing", 2)
        assert len(states) == count
        run.control.resume()
    assert run.tick() == states[-1] and states[-1].status == "finished"


def test_a_tick_waits_for_no_device(monkeypatch):
    loop = Loop()
    with start_run(loop.model, 10) as run:
        run.step(loop.one())
        run._published_at = float("inf")  # nothing is published, so that the loss stays a tensor
        run.step(loop.one())
        monkeypatch.setattr(Record, "on_host", property(lambda self: False))
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("waited for a device"))
        latest = run.tick()
        assert latest is not None and latest.step == 2
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["loss", "tokens", "gradient_norm"])
def test_what_is_on_a_device_is_not_on_the_host(name):
    record = Record()
    values = {"loss": 1.0, "learning_rate": None, "tokens": torch.tensor(3), "epoch": None, "gradient_norm": None}
    record.add(1, **values)
    assert record.on_host
    record.add(2, **values | {name: torch.empty((), device="meta")})
    assert not record.on_host


def test_a_tick_knows_a_step_that_came_too_soon_to_be_published():
    loop, clock = Loop(), Clock()
    states: list[TrainState] = []
    with start_run(loop.model, 10, clock=clock, publish=states.append) as run:
        clock.advance(0.01)
        loss = loop.one()
        run.step(loss)
        assert states[-1].step == 0
        clock.advance(15.0)  # inside the second step
        latest = run.tick()
        assert latest is not None and latest.step == 1 and latest.loss == pytest.approx(loss.item())
        assert states[-1].step == 0


def test_a_run_is_saved_when_a_person_asks_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trainable(name="sql")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[1, 2, 3, 4]])
    with start_run(model, 3) as run:
        for step in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 2:
                run.control.request_save()
                assert run.tick().message == "saving after this step"
            run.step()
            if step == 0:
                assert run.state.message == "saved in sql-step-1"
    assert run.state.message == "saved in sql-step-2" and run.state.step == 3
    twin = PeftModel.from_pretrained(llama(), str(tmp_path / "sql-step-2"), adapter_name="sql")
    assert twin.active_adapters == ["sql"]


def test_a_run_that_cannot_be_saved_says_why_and_goes_on(tmp_path):
    loop = Loop()
    with start_run(loop.model, 1) as run:
        run.control.request_save()
        run.step(loop.one())
    assert run.state.message == "not saved: the model has no adapters" and run.state.status == "finished"


def test_what_became_of_a_save_is_shown_at_once():
    loop = Loop()
    states: list[TrainState] = []
    with start_run(loop.model, 3, publish=states.append, clock=Clock()) as run:
        run.step(loop.one())
        run.control.request_save()
        run.step(loop.one())  # at the same time as the last display
        assert states[-1].message == "not saved: the model has no adapters"


def test_an_answer_that_is_sampled_is_shown_at_once():
    states: list[TrainState] = []
    with start_run(Loop().model, 3, publish=states.append, clock=Clock()) as run:
        run.sampled([Sample(0, "Oslo?", "a city")])
        assert [sample.answer for sample in states[-1].samples] == ["a city"]


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([3.0, 12.0, 20.0], True),
        ([3.0, 12.0, 2.9, 12.0, 2.8], False),
        ([0.7, 2.2, 2.3], False),
        ([5.7, 11.5, 9.6], True),
        ([0.3, 3.6, 3.7], False),
        ([7.0, 8.5, 8.5], False),
        ([400.0, 900.0, 900.0], False),
        ([float("nan"), 3.0, 10.0, 10.0], True),
    ],
)
def test_a_loss_that_rises_far_is_told(losses: list[float], told: bool) -> None:
    """One outlier, or a rise as in a noisy training, is none."""
    run = start_run(nn.Linear(1, 1))
    run.shown = "card"
    with run:
        for loss in losses:
            run.step(loss)
    said = [note for note in run.state.warnings if "The loss rose from" in note]
    assert len(said) == int(told) and all("is the learning rate too high?" in note for note in said)


def test_where_other_processes_stopped_is_told_in_their_words():
    loop = Loop()
    run = start_run(loop.model, total_steps=5)
    run.mirrors = True
    with run:
        run.step(loop.one())
        run.mirror(dataclasses.replace(run.state, status="stopped", step=3, message="stopped at step 3: it diverged"))
        assert run.stop_message() == "stopped at step 3: it diverged"
