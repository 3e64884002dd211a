"""Turns of other threads between the steps of a training: who has one, and when the training goes on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from torch import nn

from nbpeft.engine.changes.step_gate import StepGate
from nbpeft.session.background import TurnTakingControl
from tests.waiting import PATIENCE, wait_until

MOST = 60
"""Turns of a thread that never pauses."""


class Callers:
    """Threads that take one turn after the other, without a pause.

    Attributes:
        taken: who had a turn, in order.
    """

    def __init__(self, gate: StepGate, names: str) -> None:
        self._gate, self.names = gate, names
        self.taken: list[str] = []
        self._threads = [threading.Thread(target=self._call, args=[name], daemon=True) for name in names]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
            self.wait(self._threads.index(thread) + 1)

    def wait(self, count: int | None = None) -> None:
        """Until so many of them wait, or all."""
        for _ in range(3000):
            if len(self._gate._waiting) == (len(self.names) if count is None else count):
                return
            time.sleep(0.001)
        raise AssertionError("they do not come")

    def end(self) -> None:
        self._gate.end()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _call(self, name: str) -> None:
        for _ in range(MOST):
            with self._gate.hold():
                if self._gate._ended:
                    return
                self.taken.append(name)


@pytest.fixture
def gate() -> Iterator[StepGate]:
    model = nn.Linear(1, 1)
    made = StepGate(model, "training a")
    made.acquire()
    made.model = model  # type: ignore[attr-defined]  # they hold it weakly
    yield made


def test_each_who_waits_has_one_turn_for_each_step(gate: StepGate) -> None:
    """In the order in which they came: four threads and a training have a fifth each."""
    callers = Callers(gate, "abcd")
    callers.start()
    for step in range(10):
        callers.wait()
        waiting = [block.thread for block in gate._waiting]
        assert gate.yield_between_steps()
        had = callers.taken[4 * step :]
        assert sorted(had) == list("abcd")
        assert had == [
            name for number in waiting for name in "abcd" if number == callers._threads["abcd".index(name)].ident
        ]
    callers.end()
    assert Counter(callers.taken) == dict.fromkeys("abcd", 10)


def test_without_anybody_who_waits_no_time_is_lost(gate: StepGate) -> None:
    assert not gate.yield_between_steps()


def test_a_stop_lets_nobody_in_before_it(gate: StepGate) -> None:
    callers, control = Callers(gate, "ab"), TurnTakingControl(gate)
    callers.start()
    control.request_stop()
    assert control.wait_or_stop() and not callers.taken
    callers.end()


def test_a_stop_waits_for_the_turn_that_runs_alone(gate: StepGate) -> None:
    callers, control = Callers(gate, "abc"), TurnTakingControl(gate)
    took = callers.taken

    class Stops(list[str]):
        def append(self, name: str) -> None:
            took.append(name)
            control.request_stop()
            while gate._admitted:  # the training has heard of it
                time.sleep(0.001)

    callers.taken = Stops()
    callers.start()
    assert control.wait_or_stop() and took == ["a"]
    callers.end()


def test_while_it_is_paused_they_have_one_turn_after_the_other(gate: StepGate) -> None:
    callers, control = Callers(gate, "a"), TurnTakingControl(gate)
    callers.start()
    control.pause()

    class Resumes(list[str]):
        def append(self, name: str) -> None:
            super().append(name)
            if len(self) == 5:
                control.resume()

    callers.taken = Resumes()
    assert not control.wait_or_stop()
    assert len(callers.taken) >= 5
    callers.end()


def test_who_has_a_turn_finds_a_model_that_does_not_train(gate: StepGate) -> None:
    model, seen = gate.model, []  # type: ignore[attr-defined]

    def call() -> None:
        with gate.hold():
            seen.append(model.training)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    wait_until(lambda: gate._waiting)
    assert gate.yield_between_steps() and seen == [False] and model.training
    thread.join(PATIENCE)
