"""The training state of a method that is not in the adapter's file: pruned ranks, moving averages, generators.

It is saved next to the optimizer's state; the adapter's file then contains all trainable tensors (``in_training``).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.tensor_file import TensorFile, storable, write_tensors
from nbpeft.engine.runtime.method_hooks import has_training_state, in_training, set_training_state, training_state
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import CorruptCheckpointError
from nbpeft.model.saving import files
from nbpeft.model.saving.sharded import gathered

_FILE = "method_state.safetensors"
_MOST_STATES = 16
"""The greatest size of a training state, in multiples of the size of the model with its adapters."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""The tensors in an optimizer's state that have the shape of their parameter."""

logger = logging.getLogger("nbpeft.training")


def save_in_training(manager: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Saves adapters with all trainable tensors, so that their training can be resumed.

    Args:
        manager: the manager of the adapters.
        folder: the folder to write.
        **options: further arguments of ``files.save``.
    """
    files.save(manager, folder, rewrite=functools.partial(in_training, manager), **options)


def keeps_method_state(model: nn.Module) -> bool:
    """Whether the methods of the adapters in training have a training state."""
    manager = manager_of(model)
    return manager is not None and has_training_state(manager)


def write_method_state(model: nn.Module, folder: Path, *, write: bool) -> None:
    """Writes the training state into a checkpoint, if there is one.

    Args:
        model: the model in training.
        folder: the folder with the optimizer's state.
        write: whether this process writes; all processes of a training must call it, as it gathers shards.
    """
    state = method_state(model)
    if state is None:
        return
    whole = {key: gathered(tensor) for key, tensor in sorted(state.items())}
    if write:
        write_tensors(folder / _FILE, storable(whole), {})


def read_method_state(model: nn.Module, folder: Path) -> bool:
    """Restores the training state from a checkpoint.

    Args:
        model: the model in training, whose optimizer exists already.
        folder: the folder with the optimizer's state.

    Returns:
        False if the adapters need a state and the folder has none.
    """
    file = folder / _FILE
    if not keeps_method_state(model):
        return True
    if not inside.leads_to_file(file):
        return False
    set_training_state(manager_of(model), read_state(file, model)[0])
    return True


def read_state(file: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a training state; a file whose header names implausibly large tensors is refused unread.

    Args:
        file: the file.
        model: the model in training.

    Returns:
        Name -> tensor, and the metadata.

    Raises:
        CorruptCheckpointError: the file is truncated, altered or something else.
    """
    source = TensorFile(file)
    size = sum(tensor.nbytes for tensor in source.header.values())
    most = _MOST_STATES * sum(parameter.nbytes for parameter in model.parameters())
    if size > most:
        raise CorruptCheckpointError(
            f"{file.name} has {size:,} bytes of tensors; a state of this model has at most {most:,}"
        )
    return source.read(source.header), source.metadata


def method_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A copy of the current training state; None if there is none."""
    return training_state(manager_of(model)) if keeps_method_state(model) else None


def set_method_state(model: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """Restores a training state.

    Args:
        model: the model in training.
        state: a result of ``method_state``; None changes nothing, an empty state is that of a new training.
    """
    if state is not None and keeps_method_state(model):
        set_training_state(manager_of(model), state)


def drop_mismatched_moments(optimizer: Any) -> bool:
    """Removes an optimizer's state of parameters that have another shape now.

    Args:
        optimizer: the optimizer, with a state loaded from a file.

    Returns:
        Whether there were such parameters.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    mismatched = [
        parameter
        for parameter, state in inner.state.items()
        if any(name in state and state[name].shape != parameter.shape for name in _MOMENTS)
    ]
    for parameter in mismatched:
        del inner.state[parameter]
    return bool(mismatched)


def note(trainer: Any, message: str) -> None:
    """Adds a note to the run of a Trainer, or logs a warning if it has no run.

    Args:
        trainer: a ``transformers.Trainer``.
        message: the note.
    """
    notes = [
        add_note for item in trainer.callback_handler.callbacks if (add_note := getattr(item, "note", None)) is not None
    ]
    for add_note in notes or [logger.warning]:
        add_note(message)
