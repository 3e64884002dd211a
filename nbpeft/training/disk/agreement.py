"""Communication between the processes of one training; without effect in a single process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from nbpeft.errors import CheckpointError, TrainingError, in_one_line
from nbpeft.training.disk.checkpoints import write_errors

_Part = TypeVar("_Part")


def is_distributed() -> bool:
    """Whether this process is one of several in ``torch.distributed``."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_launched() -> bool:
    """Whether this process was started by a launcher of distributed training."""
    return "LOCAL_RANK" in os.environ


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and reports for all; True in a single process."""
    return not is_distributed() or distributed.get_rank() == 0


def broadcast_from_rank0(value: Any) -> Any:
    """Returns the value of rank 0; every process must call it.

    Args:
        value: the value of this process; it is pickled if there are several.
    """
    if not is_distributed():
        return value
    sent = [value]
    distributed.broadcast_object_list(sent, 0, group=_on_the_cpu())
    return sent[0]


def own_share(items: Sequence[_Part]) -> Sequence[_Part]:
    """The items of this process, if they are shared out to all processes; all of them in a single one."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if is_distributed() else items


def gathered(compute: Callable[[], _Part]) -> list[_Part]:
    """What each process computes, in the order of their ranks; every process must call it.

    Args:
        compute: computes the part of this process, which is pickled if there are several.

    Raises:
        TrainingError: another process failed.
        Exception: the error of this process, which the others raise as a TrainingError at the same time.
    """
    if not is_distributed():
        return [compute()]
    part, problem, raised = None, "", None
    try:
        part = compute()
    except Exception as error:
        problem, raised = in_one_line(error) or type(error).__name__, error
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (part, problem), group=_on_the_cpu())
    if raised is not None:
        raise raised
    if failed := next(filter(None, (words for _, words in found)), ""):
        raise TrainingError(failed)
    return [value for value, _ in found]


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Group of all processes -> a gloo group of the same processes, which communicates on the CPU."""


def _on_the_cpu() -> Any:
    """The CPU group of all processes: a collective on the GPU would wait for all work queued there."""
    world = distributed.group.WORLD
    if world not in _groups:
        _groups[world] = distributed.new_group(backend="gloo")
    return _groups[world]


def save_collectively(put: Callable[[Callable[[Path], object]], object], write: Callable[[Path], object]) -> None:
    """Writes a folder to which each process contributes a part; every process must call it.

    Args:
        put: creates the folder, lets ``write`` fill it, and moves it to its place; called in rank 0.
        write: writes this process's part.

    Raises:
        CheckpointError: a part cannot be written. Rank 0 raises it, the others continue.
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
    """Writes this process's part, and waits for the others; rank 0 raises the first error of any process."""
    problem = ""
    try:
        with write_errors(folder):
            write(folder)
    except CheckpointError as error:
        problem = in_one_line(error)
    problems: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem, group=_on_the_cpu())
    if is_main_process() and any(problems):
        raise CheckpointError(next(filter(None, problems)))
