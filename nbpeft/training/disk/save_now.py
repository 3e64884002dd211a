"""Saving what is trained while the run goes on, because a person asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import TrainingError
from nbpeft.training.adapters.adapted_model import trained_names


def save_adapters(model: Any, folder: str, step: int, *, together: bool, write: bool) -> str:
    """Saves the adapters in training, as PEFT would, into a new folder of their name and step.

    Args:
        model: in training.
        folder: where the new folder goes; the working directory where it is empty.
        step: optimizer steps done.
        together: whether all processes call it, where there are several.
        write: whether this process writes.

    Returns:
        The new folder.

    Raises:
        TrainingError: the model carries no adapters, or this process has a part of them and calls it alone.
        CheckpointError: it cannot be written.
    """
    manager = manager_of(model)
    if manager is None:
        raise TrainingError("the model carries no adapters")
    from nbpeft.model.saving import files  # tracking a loop imports no more than it needs
    from nbpeft.model.saving.sharded import is_sharded
    from nbpeft.training.disk.agreement import is_distributed

    if not together and is_distributed() and is_sharded(manager.model):  # it would wait for the others for ever
        raise TrainingError("each process has a part of the model, and one alone was asked: use Trainer.save_model")
    names = trained_names(model)
    place = _free(Path(folder or "."), f"{names[0] if len(names) == 1 else 'adapters'}-step-{step}")
    files.save(manager, place, names=names, flat=len(names) == 1, write=write)
    return str(place)


def _free(folder: Path, name: str) -> Path:
    """A path in the folder that is not taken: an earlier run may have been saved at the same step."""
    place, number = folder / name, 2
    while place.exists():
        place, number = folder / f"{name}-{number}", number + 1
    return place
