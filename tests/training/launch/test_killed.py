"""Training in two processes that are killed, one of them or the one that waits, and what a new one makes of it."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nbpeft.errors import TrainingError, TrainingInterrupted
from nbpeft.runs.record import RunRecord
from nbpeft.runs.store import RunStore
from nbpeft.training.launch.job import JOB
from tests.closeness import assert_close
from tests.faults.killing import die, forked
from tests.runs.killed import ARGUMENTS, adapted_session, rows
from tests.tiny_models import same_state
from tests.training.launch.callbacks import KeepsEachState, LeavesTheOtherWaiting
from tests.training.launch.test_launch import close, when_shown
from tests.training.support import weights
from tests.waiting import wait_until

TWO: dict[str, Any] = {**ARGUMENTS, "processes": 2, "per_device_train_batch_size": 2}


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_of_a_process_and_of_the_one_that_waits(tmp_path: Path) -> None:
    """In as many processes as it had, each with its own random numbers: dropout is that of an unbroken run."""
    place = tmp_path / "runs"
    session, model = adapted_session(place)
    with pytest.raises(TrainingError, match=r"process 1 of 2: was killed by signal SIGKILL \(out of memory\?\)"):
        session.train(model, rows(), callbacks=[KeepsEachState(dies_after=5)], **TWO)
    (record,) = RunStore(place).records()
    assert (record.status, record.kept_steps[0]) == ("failed", 4) and "SIGKILL" in record.message

    def go_on_and_die() -> None:
        session, model = adapted_session(place)
        session.on_run(lambda run, name: when_shown(run, 6, die))
        session.resume(model=model, data=rows(), processes=2, callbacks=[KeepsEachState()])

    assert forked(go_on_and_die)
    record = ended(place)
    assert record.status == "stopped" and 6 <= record.step == record.kept_steps[0] < ARGUMENTS["max_steps"]
    again, found = adapted_session(place)
    result = again.resume(model=found, data=rows(), processes=2, callbacks=[])
    assert result.step == record.step and result.training is not None
    assert result.training.steps == ARGUMENTS["max_steps"]
    unbroken, expected = adapted_session(tmp_path / "whole")
    unbroken.train(expected, rows(), **TWO)
    close(weights(found, "sql"), weights(expected, "sql"))
    logged = [
        [entry["loss"] for entry in RunStore(at).find("sql-1").entries() if "loss" in entry]
        for at in (place, tmp_path / "whole")
    ]
    assert_close(logged[0], logged[1])


@pytest.mark.slow
def test_processes_in_a_collective_operation_end_with_the_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the copy of the model with them, which nobody else would remove."""
    scratch, numbers = tmp_path / "scratch", tmp_path / "numbers"
    scratch.mkdir()
    numbers.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def train_and_die() -> None:
        session, model = adapted_session(tmp_path / "runs")
        threading.Thread(target=die_when_there, args=[numbers / "waiting"], daemon=True).start()
        session.train(model, rows(), callbacks=[LeavesTheOtherWaiting(numbers)], **TWO)

    assert forked(train_and_die)
    processes = [int((numbers / rank).read_text()) for rank in ("0", "1")]
    for _ in range(300):
        if not any(map(goes_on, processes)) and not list(scratch.rglob(JOB)):
            return
        time.sleep(0.1)
    left = [psutil.Process(number) for number in processes if goes_on(number)]
    for process in left:
        process.kill()
    raise AssertionError(f"{left} go on, and {list(scratch.rglob(JOB))} are there")


def die_when_there(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    die()


def goes_on(number: int) -> bool:
    """Whether a process does; one that has ended may have nobody who asks for its status."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_what_is_interrupted_twice_says_that_the_adapter_is_as_before(tmp_path: Path) -> None:
    """Also where it was to start anew: what it had learned before is worth more than what never came back."""
    session, model = adapted_session(tmp_path)
    with torch.no_grad():
        for parameter in model.manager.parameters("sql"):
            parameter.add_(0.5)
    before, unsaved = weights(model, "sql"), set(model.manager.unsaved)

    def interrupt(run: Any) -> None:
        run.control.relay = interrupts
        raise KeyboardInterrupt

    def interrupts(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    session.on_run(lambda run, name: when_shown(run, 3, lambda: interrupt(run)))
    with pytest.raises(TrainingInterrupted) as caught:
        session.train(model, rows(), restart=True, callbacks=[KeepsEachState()], **TWO)
    (record,) = RunStore(tmp_path).records()
    assert record.status == "stopped" and record.step >= 2 and record.kept_steps
    told = f"the adapters are unchanged; run sql-1 can be resumed from step {record.kept_steps[0]}"
    assert str(caught.value).endswith(f" · {told}") and told in caught.value.result.message
    assert same_state(weights(model, "sql"), before) and model.manager.unsaved == unsaved
    assert session.context.models.get(model).steps_of(["sql"]) == (0, "")


def ended(place: Path) -> RunRecord:
    """The run when its processes, which nobody waits for any more, have ended."""
    wait_until(lambda: RunStore(place).records()[0].status != "running")
    (record,) = RunStore(place).records()
    return record
