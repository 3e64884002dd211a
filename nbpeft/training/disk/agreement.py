"""What the processes of one training agree on; in a training of one process each of these does nothing."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from nbpeft.errors import CheckpointError, in_one_line
from nbpeft.training.disk.checkpoints import write_errors


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_launched() -> bool:
    """Whether a launcher has started this process, to train with others."""
    return "LOCAL_RANK" in os.environ


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return not is_distributed() or distributed.get_rank() == 0


def broadcast_from_rank0(value: Any) -> Any:
    """What the first process has; every process must call it.

    Args:
        value: of this process; pickled where there are several.
    """
    if not is_distributed():
        return value
    sent = [value]
    distributed.broadcast_object_list(sent, 0, group=_on_the_cpu())
    return sent[0]


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Group of all processes -> one of the same processes that communicates on the CPU."""


def _on_the_cpu() -> Any:
    """The group of all processes for what is no work of a card, so that nothing waits for one."""
    world = distributed.group.WORLD
    if world not in _groups:
        _groups[world] = distributed.new_group(backend="gloo")
    return _groups[world]


def save_collectively(put: Callable[[Callable[[Path], object]], object], write: Callable[[Path], object]) -> None:
    """Writes a folder of which each process has a part; every process must call it.

    Args:
        put: makes the folder, lets ``write`` fill it, and moves it to its place; called in the first process.
        write: writes this process's part.

    Raises:
        CheckpointError: it cannot be written. The first process raises it, the others go on.
    """
    if not is_distributed():
        put(write)
    elif is_main_process():
        _put_for_all(put, write)
    else:
        folder = broadcast_from_rank0(None)
        if folder is not None:
            _write_in_step(write, folder)


def _put_for_all(put: Callable[[Callable[[Path], object]], object], write: Callable[[Path], object]) -> None:
    announced = False

    def together(folder: Path) -> None:
        nonlocal announced
        announced = True
        broadcast_from_rank0(folder)
        _write_in_step(write, folder)

    try:
        put(together)
    finally:
        if not announced:
            broadcast_from_rank0(None)


def _write_in_step(write: Callable[[Path], object], folder: Path) -> None:
    """Writes, and returns when all have; the first process raises what another could not write."""
    problem = ""
    try:
        with write_errors(folder):
            write(folder)
    except CheckpointError as error:
        problem = in_one_line(error)
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, problem, group=_on_the_cpu())
    if is_main_process() and any(told):
        raise CheckpointError(next(filter(None, told)))
