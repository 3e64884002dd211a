"""Atomic checkpoints of a Trainer; resuming skips incomplete ones.

A Trainer writes the files of ``checkpoint-N`` one after the other into that folder. Here it writes
them into a hidden folder next to it, which is renamed in one step when all files are flushed to disk.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.atomic import NewFile, disk_errors, new_folder, put_folder, replace_files
from nbpeft.checkpoint.inside import shown
from nbpeft.checkpoint.staging import Staging, discard, make_folder, scratch_folder, staging_name, sweep
from nbpeft.checkpoint.tensor_file import read_metadata
from nbpeft.confidential import is_secret
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, few
from nbpeft.training.disk.checkpoint_damage import STATE, archive_damage, state_damage

_PREFIX = "checkpoint"
_NAME = re.compile(rf"{_PREFIX}-(\d+)")
_ARGUMENTS = "training_args.bin"
_WRITES_CHECKPOINT = "_nbpeft_writes_checkpoint"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MOST_PER_BYTE, _MOST_EXTRA = 32, 2**26
"""Limit of the size of a checkpoint's other files: bytes per byte of its adapter, plus a constant number of bytes.
An optimizer stores two to four numbers for each parameter."""


def save_whole(trainer: Any, trial: Any, save: Callable[[], None]) -> None:
    """Lets a Trainer write a checkpoint, and moves it to its place when it is complete. Called by all processes.

    Args:
        trainer: a ``transformers.Trainer``.
        trial: the argument of its ``_save_checkpoint``.
        save: the Trainer's own method of writing one.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are unchanged.
    """
    from accelerate.utils import broadcast_object_list

    home = Path(trainer._get_output_dir(trial=trial))
    name = f"{_PREFIX}-{trainer.state.global_step}"
    main, wait = bool(trainer.args.should_save), trainer.accelerator.wait_for_everyone
    staging: Staging | None = None
    pushes: list[str] = []
    with write_errors(home):
        try:
            if main:
                make_folder(home, [])
                sweep(home)
            place = home / broadcast_object_list([staging_name(home) if main else ""])[0]
            if main:
                staging = Staging(home, place.name)
            wait()
            with _redirected(trainer, place, pushes):
                _set_best(trainer, home)
                save()
            wait()
            _correct_best(trainer, place / name, home / name, main=main)
            if staging is not None:
                put_folder(staging, home, name)
        finally:
            if staging is not None:
                staging.close()
    wait()
    for _ in pushes:
        trainer._push_from_checkpoint(str(home / name))
    if main:
        _rotate(trainer, home)


def put_checkpoint(home: Path, step: int, write: Callable[[Path], object], *, most: int) -> None:
    """Writes ``checkpoint-STEP`` into a folder, completely or not at all, and removes the oldest ones above a limit.

    Args:
        home: an existing folder.
        step: optimizer steps done.
        write: writes the files into the folder it is called with.
        most: the greatest number of checkpoints to keep.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are unchanged.
    """
    name = f"{_PREFIX}-{step}"
    with write_errors(home):
        with new_folder(home, name) as folder:
            folder.mkdir()
            write(folder)
        discard(home, [folder.name for folder in _checkpoints(home)[most:]])


def drop_after(home: Path, step: int) -> None:
    """Removes the checkpoints after a step, if at least one of that step or an earlier one remains.

    Args:
        home: an existing folder.
        step: optimizer steps done.

    Raises:
        CheckpointError: a checkpoint cannot be removed.
    """
    with write_errors(home):
        folders = _checkpoints(home)
        later = [folder for folder in folders if int(folder.name.rpartition("-")[2]) > step]
        if later and len(later) < len(folders):
            discard(home, [folder.name for folder in later])


def save_tokenizer_and_arguments(folder: Path, trainer: Any) -> None:
    """Writes what a Trainer saves next to the weights: the tokenizer, if any, and its arguments without access tokens.

    Args:
        folder: the folder of the weights.
        trainer: the Trainer.

    Raises:
        CheckpointError: they cannot be written; existing files are unchanged.
    """
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    arguments = copy.copy(trainer.args)
    for name, value in vars(arguments).items():
        if is_secret(name, value):
            setattr(arguments, name, None)
    with write_errors(folder), scratch_folder() as scratch:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))
        torch.save(arguments, scratch / _ARGUMENTS)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        replace_files(folder, [NewFile.copy_of(path, str(path.relative_to(scratch))) for path in files])


def resume_point(trainer: Any, requested: Any) -> Any:
    """The checkpoint to resume from. Called by all processes.

    Args:
        trainer: a ``transformers.Trainer``.
        requested: True for the last complete one, a folder, or None or False for none.

    Returns:
        A folder, or ``requested`` if nothing is resumed.

    Raises:
        CheckpointNotFoundError: there is none, or the requested one is incomplete or damaged.
    """
    if requested is not True and not isinstance(requested, str | os.PathLike):
        return requested
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None]
    if trainer.is_world_process_zero():
        try:
            result = [last_whole(Path(trainer.args.output_dir)) if requested is True else _checked(Path(requested))]
        except CheckpointError as error:
            result = [error]
    result = broadcast_object_list(result)
    if isinstance(result[0], CheckpointError):
        raise result[0]
    return str(result[0])


def flaw_of(folder: Path, *, strict: bool = False) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it can.

    It may be incomplete because another program was interrupted while writing or copying it.

    Args:
        folder: the checkpoint.
        strict: whether it may come from someone else and should have been written by nbpeft: then links in it are
            refused, and files that need much more memory than its adapter.
    """
    try:
        return _flaw_of(folder, strict=strict)
    except OSError as error:
        return _unreadable(error)
    except CheckpointError as error:
        return error.message


def _flaw_of(folder: Path, *, strict: bool) -> str | None:
    """Like ``flaw_of``; raises an error if a file cannot be read, which says nothing about its content."""
    odd = inside.first_not_plain(folder) if strict else None
    if odd is not None:
        return odd
    if not inside.leads_to_file(folder / STATE):
        return f"no {STATE}"
    # Path.glob takes a folder that it may not read for empty.
    folders = (folder, *(path for path in folder.iterdir() if inside.leads_to_folder(path)))
    weights = [path for parent in folders for name in _WEIGHTS if inside.leads_to_file(path := parent / name)]
    if not weights:
        return "no adapter"
    if strict and _is_too_large(folder, weights):
        return "much larger than its adapter"
    damage = state_damage(folder / STATE)
    if damage is not None:
        return damage
    archives = [path for path in (*folder.glob("*.pt"), *folder.glob("*.pth")) if inside.leads_to_file(path)]
    packed = [*archives, *(path for path in weights if path.suffix == ".bin")]
    checks: list[tuple[Callable[[Path], str | None], list[Path]]] = [
        *((_archive_cut, packed), (archive_damage, archives), (_weights_cut, weights))
    ]
    flaws = (_certain(check, path) for check, paths in checks for path in paths)
    return next(filter(None, flaws), None)


def _archive_cut(path: Path) -> str | None:
    return None if zipfile.is_zipfile(path) else f"{path.name} is cut off"


def _weights_cut(path: Path) -> str | None:
    try:
        read_metadata(path)
    except CheckpointError:
        return f"{path.name} is cut off"
    return None


def _certain(check: Callable[[Path], str | None], path: Path) -> str | None:
    """The flaw of a file, which libraries also report where a read has failed: then raises OSError, or checks again."""
    if check(path) is None:
        return None
    with open(path, "rb") as file:
        while file.read(2**20):
            pass
    return check(path)


def _unreadable(error: OSError) -> str:
    name = os.path.basename(error.filename) if isinstance(error.filename, str) else "a file"
    return f"{name} cannot be read: {error.strerror}"


@contextmanager
def read_errors(folder: Path) -> Iterator[None]:
    """A block that reads a checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{shown(folder)}: {_unreadable(error)}", folder=str(folder)) from error


def _is_too_large(folder: Path, weights: list[Path]) -> bool:
    """Whether the optimizer, random state etc. are larger than they can be for an adapter of that size."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    adapter_size = sum(path.stat().st_size for path in weights)
    return size - adapter_size > _MOST_PER_BYTE * adapter_size + _MOST_EXTRA


def last_whole(home: Path, *, strict: bool = False) -> Path:
    """The last complete checkpoint in a folder; warns about those that are skipped.

    Args:
        home: the folder.
        strict: see ``flaw_of``.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        CheckpointError: one cannot be read. It is not skipped, because it may be whole, and a training that resumes
            from an earlier one would replace it.
    """
    sweep(home)
    flaws: dict[str, str] = {}
    with read_errors(home):
        folders = _checkpoints(home)
    for folder in folders:
        with read_errors(folder):
            flaw = _flaw_of(folder, strict=strict) if not (strict and folder.is_symlink()) else "a link"
        if flaw is None:
            if flaws:
                warnings.warn(f"skipped {_listed(flaws)}: resuming from {shown(folder)}", stacklevel=5)
            return folder
        flaws[folder.name] = flaw
    also = f": skipped {_listed(flaws)}" if flaws else ""
    raise CheckpointNotFoundError(
        f"{shown(home)} has no complete checkpoint to resume from{also}", folder=str(home), flaws=flaws
    )


def _checked(folder: Path) -> Path:
    if not inside.leads_to_folder(folder):
        raise CheckpointNotFoundError(f"there is no folder {shown(folder)} to resume from", folder=str(folder))
    flaw = flaw_of(folder)
    if flaw is None:
        return folder
    other = None
    with contextlib.suppress(OSError, CheckpointError):  # a hint alone
        siblings = (other for other in _checkpoints(folder.parent) if other.name != folder.name)
        other = next((other for other in siblings if flaw_of(other) is None), None)
    hint = f"; {shown(other)} is complete" if other is not None else ""
    raise CheckpointNotFoundError(f"{shown(folder)} cannot be resumed from ({flaw}){hint}", folder=str(folder))


def _checkpoints(home: Path) -> list[Path]:
    """The folders called ``checkpoint-N``, the last step first.

    Raises:
        OSError: they cannot be listed.
        CheckpointError: it is not seen whether one is a folder.
    """
    names = os.listdir(home) if inside.leads_to_folder(home) else []
    steps = {int(match[1]): home / name for name in names if (match := _NAME.fullmatch(name))}
    return [steps[step] for step in sorted(steps, reverse=True) if inside.leads_to_folder(steps[step])]


def _listed(flaws: dict[str, str]) -> str:
    return few((f"{name} ({flaw})" for name, flaw in flaws.items()), 3, quoted=False)


def in_checkpoint(trainer: Any) -> bool:
    """Whether a Trainer is writing a checkpoint to resume from, and not only the adapter."""
    return bool(vars(trainer).get(_WRITES_CHECKPOINT))


@contextmanager
def _redirected(trainer: Any, place: Path, pushes: list[str]) -> Iterator[None]:
    """Lets a Trainer write below another folder, and records in ``pushes`` what it would upload from there."""
    overrides: dict[str, Any] = {
        "_get_output_dir": lambda *args, **kwargs: str(place),
        "_push_from_checkpoint": pushes.append,
        "_rotate_checkpoints": lambda *args, **kwargs: None,
        _WRITES_CHECKPOINT: True,
    }
    before = {name: vars(trainer)[name] for name in overrides if name in vars(trainer)}
    vars(trainer).update(overrides)
    try:
        yield
    finally:
        for name in overrides:
            del vars(trainer)[name]
        vars(trainer).update(before)


def _set_best(trainer: Any, home: Path) -> None:
    """Sets the path of the best checkpoint, which the Trainer would look for in the redirected folder."""
    best = home / f"{_PREFIX}-{trainer.state.best_global_step}"
    if trainer.state.best_global_step and inside.leads_to_folder(best):
        trainer.state.best_model_checkpoint = str(best)


def _correct_best(trainer: Any, written: Path, place: Path, *, main: bool) -> None:
    """Lets the Trainer's state name the final path of the checkpoint, not the one where it was written."""
    if trainer.state.best_model_checkpoint == str(written):
        trainer.state.best_model_checkpoint = str(place)
        if main:
            trainer.state.save_to_json(str(written / STATE))


def _rotate(trainer: Any, home: Path) -> None:
    """Removes the oldest checkpoints above ``save_total_limit``, but neither the last nor the best one."""
    if hasattr(trainer, "_rotate_checkpoints"):  # a subclass may have it
        trainer._rotate_checkpoints(use_mtime=True, output_dir=str(home))
        return
    limit = trainer.args.save_total_limit
    if limit is None or limit <= 0:
        return
    with contextlib.suppress(OSError, CheckpointError):  # what cannot be removed now is removed another time
        ordered = sorted(reversed(_checkpoints(home)), key=lambda folder: folder.stat().st_mtime_ns)
        to_keep = {*ordered[-1:], Path(trainer.state.best_model_checkpoint or home)}
        surplus = [folder for folder in ordered if folder not in to_keep][: max(len(ordered) - limit, 0)]
        discard(home, [folder.name for folder in surplus])


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """A block like ``disk_errors``, which also converts the RuntimeErrors that torch raises when a disk is full.

    Args:
        folder: the folder that is written.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with disk_errors(folder):
            yield
    except RuntimeError as error:
        if not _is_write_error(error):
            raise
        raise CheckpointError(f"could not write to {shown(folder)}: the disk is full or fails") from error


def _is_write_error(error: RuntimeError) -> bool:
    """Whether an error was raised by torch's file writer, which is recognized by its frame: its messages vary."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename == torch.serialization.__file__
