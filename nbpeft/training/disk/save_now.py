"""Saving the adapters during a run, at the user's request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbpeft.checkpoint import inside
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import TrainingError
from nbpeft.training.adapters.adapted_model import trained_names


def save_adapters(model: Any, folder: str, step: int, *, together: bool, write: bool) -> str:
    """Saves the adapters in training in PEFT's format, into a new folder named after them and the step.

    Args:
        model: the model in training.
        folder: the parent of the new folder; the working directory if empty.
        step: optimizer steps done.
        together: whether all processes of a distributed training call it.
        write: whether this process writes.

    Returns:
        The new folder.

    Raises:
        TrainingError: the model has no adapters, or it is sharded and only this process calls it.
        CheckpointError: the folder cannot be written.
    """
    manager = manager_of(model)
    if manager is None:
        raise TrainingError("the model has no adapters")
    from nbpeft.model.saving import files  # not at the top of the file: tracking a loop does not need them
    from nbpeft.model.saving.sharded import is_sharded
    from nbpeft.training.disk.agreement import is_distributed

    if not together and is_distributed() and is_sharded(manager.model):  # gathering would wait for the others forever
        raise TrainingError("the model is sharded and only one process was asked to save it: use Trainer.save_model")
    names = trained_names(model)
    place = _free(Path(folder or "."), f"{names[0] if len(names) == 1 else 'adapters'}-step-{step}")
    files.save(manager, place, names=names, flat=len(names) == 1, write=write)
    return str(place)


def _free(folder: Path, name: str) -> Path:
    """A path in the folder that does not exist yet: an earlier run may have been saved at the same step."""
    place, number = folder / name, 2
    while inside.is_there(place):
        place, number = folder / f"{name}-{number}", number + 1
    return place
