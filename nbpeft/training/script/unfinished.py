"""The run that a script continues when it is started again."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from nbpeft.errors import CheckpointError
from nbpeft.runs.record import CRASHED
from nbpeft.runs.store import RunPlace
from nbpeft.training.disk.checkpoints import last_whole


def unfinished_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments with which ``train`` writes a run into a folder, continuing the last one there if it did not end.

    For a script that a cluster may stop and start again::

        nbpeft.train(model, rows, **nbpeft.training.unfinished_run("runs"), num_train_epochs=3)

    Args:
        folder: the folder of the runs; need not exist.

    Returns:
        ``run_dir``, and ``resume_from_checkpoint`` if the last run was killed, stopped or failed.

    Raises:
        CheckpointError: the last run cannot be read, or none of its checkpoints is complete.
    """
    place = RunPlace.of(folder)
    unseen: dict[str, OSError] = {}
    records = place.store.records(unseen)
    for name, error in unseen.items():  # it may be the last run, beside which another would begin
        raise CheckpointError(f"run {name!r} cannot be read: {error.strerror}", name=name)
    last = records[0] if records else None
    if last is None or last.status not in (CRASHED, "stopped", "failed") or not last.kept_steps:
        return {"run_dir": place}
    state = last_whole(place.store.find(last.name).path)
    return {"run_dir": replace(place, name=last.name), "resume_from_checkpoint": str(state)}
