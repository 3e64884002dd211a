"""What a resumed training needs of a method besides the adapter's file: pruned ranks, moving averages, generators.

It is kept beside the optimizer's state; the adapter's file then holds all that trains (``in_training``).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nbpeft.checkpoint.tensor_file import TensorFile, storable, write_tensors
from nbpeft.engine.runtime.method_hooks import has_training_state, in_training, set_training_state, training_state
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import CorruptCheckpointError
from nbpeft.model.saving import files
from nbpeft.model.saving.sharded import gathered

_FILE = "method_state.safetensors"
_MOST_STATES = 16
"""A state of a training is at most so many times as large as the model with its adapters."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""In the state of an optimizer, what has the shape of its parameter."""

logger = logging.getLogger("nbpeft.training")


def save_in_training(manager: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Saves adapters as their training is resumed from them.

    Args:
        manager: has them.
        folder: where to.
        **options: further ones of ``files.save``.
    """
    files.save(manager, folder, rewrite=functools.partial(in_training, manager), **options)


def keeps_method_state(model: nn.Module) -> bool:
    """Whether the adapters of a model that train have such a state."""
    manager = manager_of(model)
    return manager is not None and has_training_state(manager)


def write_method_state(model: nn.Module, folder: Path, *, write: bool) -> None:
    """Writes the state into a folder that is resumed from; nothing where there is none.

    Args:
        model: in training.
        folder: that holds the optimizer's state.
        write: whether this process writes; all processes of a training call it.
    """
    state = method_state(model)
    if state is None:
        return
    whole = {key: gathered(tensor) for key, tensor in sorted(state.items())}
    if write:
        write_tensors(folder / _FILE, storable(whole), {})


def read_method_state(model: nn.Module, folder: Path) -> bool:
    """Sets the state that a folder holds. Returns whether it holds what the adapters in training need.

    Args:
        model: in training, its optimizer made.
        folder: as ``write_method_state`` was given.
    """
    file = folder / _FILE
    if not keeps_method_state(model):
        return True
    if not file.is_file():
        return False
    set_training_state(manager_of(model), read_state(file, model)[0])
    return True


def read_state(file: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file of tensors that belongs to a training; one that is too large for that is refused by its header.

    Args:
        file: the file.
        model: in training.

    Returns:
        Name -> tensor, and the metadata.

    Raises:
        CorruptCheckpointError: the file is truncated, altered or something else.
    """
    source = TensorFile(file)
    size = sum(tensor.nbytes for tensor in source.header.values())
    most = _MOST_STATES * sum(parameter.nbytes for parameter in model.parameters())
    if size > most:
        raise CorruptCheckpointError(f"{file.name} has {size:,} bytes of tensors; a state of this model has {most:,}")
    return source.read(source.header), source.metadata


def method_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state now, which nothing writes to any more; None where there is none."""
    return training_state(manager_of(model)) if keeps_method_state(model) else None


def set_method_state(model: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """Sets the state that ``method_state`` has returned; nothing for None, and the start of a training where empty."""
    if state is not None and keeps_method_state(model):
        set_training_state(manager_of(model), state)


def drop_mismatched_moments(optimizer: Any) -> bool:
    """Forgets what an optimizer knows of parameters that have another shape now. Returns whether there were any.

    Args:
        optimizer: whose state was read from a file.
    """
    held: Any = getattr(optimizer, "optimizer", optimizer)
    mismatched = [
        parameter
        for parameter, state in held.state.items()
        if any(name in state and state[name].shape != parameter.shape for name in _MOMENTS)
    ]
    for parameter in mismatched:
        del held.state[parameter]
    return bool(mismatched)


def note(trainer: Any, message: str) -> None:
    """Adds to the line shown with the run of a Trainer, or logs it where none is.

    Args:
        trainer: a ``transformers.Trainer``.
        message: for a person.
    """
    notes = [said for item in trainer.callback_handler.callbacks if (said := getattr(item, "note", None)) is not None]
    for said in notes or [logger.warning]:
        said(message)
