"""Training in two processes that are killed, one of them or the one that waits, and what a new one makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft.errors import TrainingError
from nbpeft.runs.record import RunRecord
from nbpeft.runs.store import RunStore
from tests.faults.killing import die, forked
from tests.runs.killed import ARGUMENTS, adapted_session, rows
from tests.training.launch.callbacks import KeepsEachState
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
        session.resume(model=model, data=rows(), callbacks=[KeepsEachState()])

    assert forked(go_on_and_die)
    record = ended(place)
    assert record.status == "stopped" and 6 <= record.step == record.kept_steps[0] < ARGUMENTS["max_steps"]
    again, found = adapted_session(place)
    result = again.resume(model=found, data=rows(), callbacks=[])
    assert result.step == record.step and result.training is not None
    assert result.training.steps == ARGUMENTS["max_steps"]
    unbroken, expected = adapted_session(tmp_path / "whole")
    unbroken.train(expected, rows(), **TWO)
    close(weights(found, "sql"), weights(expected, "sql"))
    logged = [
        [entry["loss"] for entry in RunStore(at).find("sql-1").entries() if "loss" in entry]
        for at in (place, tmp_path / "whole")
    ]
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)


def ended(place: Path) -> RunRecord:
    """The run when its processes, which nobody waits for any more, have ended."""
    wait_until(lambda: RunStore(place).records()[0].status != "running")
    (record,) = RunStore(place).records()
    return record
