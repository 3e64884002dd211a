"""Checkpoints of a Trainer: each is whole or not there, and resuming passes over those that are not.

A Trainer writes the files of ``checkpoint-N`` one after the other into their place. Here it writes
them into a hidden folder beside it, which takes that place in one move when all are on the disk.
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
from nbpeft.checkpoint.atomic import NewFile, disk_errors, flush_file, replace_files
from nbpeft.checkpoint.inside import shown
from nbpeft.checkpoint.staging import ASIDE, Staging, flush_folder, scratch_folder, staging_name, sweep
from nbpeft.checkpoint.tensor_file import read_metadata
from nbpeft.confidential import is_secret
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, few
from nbpeft.training.disk.checkpoint_damage import STATE, archive_damage, state_damage

_PREFIX = "checkpoint"
_NAME = re.compile(rf"{_PREFIX}-(\d+)")
_ARGUMENTS = "training_args.bin"
_WRITES_CHECKPOINT = "_nbpeft_writes_checkpoint"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MOST_BESIDE, _MOST_OF_SMALL = 32, 2**26
"""Bytes of a state for each of its adapter, and of any state; an optimizer keeps two to four numbers for each."""


def save_whole(trainer: Any, trial: Any, save: Callable[[], None]) -> None:
    """Lets a Trainer write a checkpoint, and puts it into its place when it is whole. Called by all processes.

    Args:
        trainer: a ``transformers.Trainer``.
        trial: what its ``_save_checkpoint`` was given.
        save: the Trainer's own way to write one.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are as they were.
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
                home.mkdir(parents=True, exist_ok=True)
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
            if main:
                _flush_tree(place / name)
                _put(place, home, name)
        finally:
            if staging is not None:
                staging.close()
    wait()
    for _ in pushes:
        trainer._push_from_checkpoint(str(home / name))
    if main:
        _rotate(trainer, home)


def put_checkpoint(home: Path, step: int, write: Callable[[Path], object], *, most: int) -> None:
    """Puts ``checkpoint-STEP`` into a folder, whole or not at all, and removes the oldest ones beyond a number.

    Args:
        home: a folder that is there.
        step: optimizer steps done.
        write: writes the files into the folder it is given.
        most: checkpoints that stay.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are as they were.
    """
    name = f"{_PREFIX}-{step}"
    with write_errors(home):
        sweep(home)
        staging = Staging(home)
        try:
            (staging.path / name).mkdir()
            write(staging.path / name)
            _flush_tree(staging.path / name)
            _put(staging.path, home, name)
            for folder in _checkpoints(home)[most:]:
                os.replace(folder, staging.path / f"old-{folder.name}")
        finally:
            staging.close()


def drop_after(home: Path, step: int) -> None:
    """Removes the checkpoints of later steps than one, where those of it or of earlier ones are left.

    Args:
        home: a folder that is there.
        step: optimizer steps done.

    Raises:
        CheckpointError: they cannot be removed.
    """
    folders = _checkpoints(home)
    later = [folder for folder in folders if int(folder.name.rpartition("-")[2]) > step]
    if not later or len(later) == len(folders):
        return
    with write_errors(home):
        staging = Staging(home)
        try:
            for folder in later:
                os.replace(folder, staging.path / folder.name)
        finally:
            staging.close()


def save_beside(folder: Path, tokenizer: Any, arguments: Any) -> None:
    """Writes what a Trainer keeps beside the weights: the tokenizer, if any, and its arguments without tokens.

    Raises:
        CheckpointError: it cannot be written; what was there is as it was.
    """
    arguments = copy.copy(arguments)
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
        requested: True for the last one that is whole, a folder, or None or False for none.

    Returns:
        A folder, or ``requested`` where nothing is resumed.

    Raises:
        CheckpointNotFoundError: there is none, or the requested folder is not whole.
    """
    if requested is not True and not isinstance(requested, str | os.PathLike):
        return requested
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if trainer.is_world_process_zero():
        try:
            found = [last_whole(Path(trainer.args.output_dir)) if requested is True else _checked(Path(requested))]
        except CheckpointError as error:
            found = [error]
    found = broadcast_object_list(found)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    return str(found[0])


def flaw_of(folder: Path, *, strict: bool = False) -> str | None:
    """What a checkpoint lacks, or None where it is whole: an older version or a copy may have been broken off.

    Args:
        folder: the checkpoint.
        strict: it may be somebody else's, and was written here: it has no links in it, and nothing that takes much more
            memory than its adapter.
    """
    try:
        odd = inside.first_not_plain(folder) if strict else None
        if odd is not None:
            return odd
        if not (folder / STATE).is_file():
            return f"no {STATE}"
        weights = [path for name in _WEIGHTS for path in (*folder.glob(name), *folder.glob(f"*/{name}"))]
        weights = [path for path in weights if path.is_file()]
        if not weights:
            return "no adapter"
        if strict and _is_too_large(folder, weights):
            return "much larger than its adapter"
        damage = state_damage(folder / STATE)
        if damage is not None:
            return damage
        archives = [path for path in (*folder.glob("*.pt"), *folder.glob("*.pth")) if path.is_file()]
        for path in [*archives, *(path for path in weights if path.suffix == ".bin")]:
            if not zipfile.is_zipfile(path):
                return f"{path.name} is cut off"
        damage = next(filter(None, map(archive_damage, archives)), None)
        if damage is not None:
            return damage
        for path in weights:
            read_metadata(path)
    except CheckpointError:
        return f"{path.name} is cut off"
    except OSError:
        return f"{STATE} cannot be read"
    return None


def _is_too_large(folder: Path, weights: list[Path]) -> bool:
    """Whether the optimizer, the random numbers and the rest take more than those of any adapter of that size."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    own = sum(sizes[path] for path in weights)
    return sum(sizes.values()) - own > _MOST_BESIDE * own + _MOST_OF_SMALL


def last_whole(home: Path, *, strict: bool = False) -> Path:
    """The last checkpoint in a folder that is whole; warns of those that are passed over.

    Args:
        home: the folder.
        strict: see ``flaw_of``.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    sweep(home)
    flaws: dict[str, str] = {}
    for folder in _checkpoints(home):
        flaw = flaw_of(folder, strict=strict) if not (strict and folder.is_symlink()) else "a link"
        if flaw is None:
            if flaws:
                warnings.warn(f"passed over {_listed(flaws)}: resuming from {shown(folder)}", stacklevel=5)
            return folder
        flaws[folder.name] = flaw
    also = f": passed over {_listed(flaws)}" if flaws else ""
    raise CheckpointNotFoundError(
        f"{shown(home)} holds no whole checkpoint to resume from{also}", folder=str(home), flaws=flaws
    )


def _checked(folder: Path) -> Path:
    if not os.path.isdir(folder):
        raise CheckpointNotFoundError(f"there is no folder {shown(folder)} to resume from", folder=str(folder))
    flaw = flaw_of(folder)
    if flaw is None:
        return folder
    others = (other for other in _checkpoints(folder.parent) if other.name != folder.name and flaw_of(other) is None)
    other = next(others, None)
    hint = f"; {shown(other)} is whole" if other is not None else ""
    raise CheckpointNotFoundError(f"{shown(folder)} cannot be resumed from ({flaw}){hint}", folder=str(folder))


def _checkpoints(home: Path) -> list[Path]:
    """Folders called ``checkpoint-N``, the last step first."""
    try:
        steps = {int(match[1]): home / name for name in os.listdir(home) if (match := _NAME.fullmatch(name))}
    except OSError:
        return []
    return [steps[step] for step in sorted(steps, reverse=True) if steps[step].is_dir()]


def _listed(flaws: dict[str, str]) -> str:
    return few((f"{name} ({flaw})" for name, flaw in flaws.items()), 3, quoted=False)


def in_checkpoint(trainer: Any) -> bool:
    """Whether a Trainer writes a checkpoint, from which training is resumed, and not the adapter alone."""
    return bool(vars(trainer).get(_WRITES_CHECKPOINT))


@contextmanager
def _redirected(trainer: Any, place: Path, pushes: list[str]) -> Iterator[None]:
    """Lets a Trainer write below another folder, and notes what it would upload from there."""
    mine: dict[str, Any] = {
        "_get_output_dir": lambda *args, **kwargs: str(place),
        "_push_from_checkpoint": pushes.append,
        "_rotate_checkpoints": lambda *args, **kwargs: None,
        _WRITES_CHECKPOINT: True,
    }
    before = {name: vars(trainer)[name] for name in mine if name in vars(trainer)}
    vars(trainer).update(mine)
    try:
        yield
    finally:
        for name in mine:
            del vars(trainer)[name]
        vars(trainer).update(before)


def _set_best(trainer: Any, home: Path) -> None:
    """Sets the place of the best checkpoint, which the Trainer looks up in the folder it believes to write to."""
    best = home / f"{_PREFIX}-{trainer.state.best_global_step}"
    if trainer.state.best_global_step and best.is_dir():
        trainer.state.best_model_checkpoint = str(best)


def _correct_best(trainer: Any, written: Path, place: Path, *, main: bool) -> None:
    """The Trainer's state names the place where the checkpoint will be, not the one where it was written."""
    if trainer.state.best_model_checkpoint == str(written):
        trainer.state.best_model_checkpoint = str(place)
        if main:
            trainer.state.save_to_json(str(written / STATE))


def _put(staging: Path, home: Path, name: str) -> None:
    """Moves a checkpoint to its place; one of the same step that is there makes room."""
    aside = staging / ASIDE / name
    try:
        if os.path.lexists(home / name):
            aside.parent.mkdir()
            os.replace(home / name, aside)
        os.replace(staging / name, home / name)
        flush_folder(home)
    except BaseException:
        if not (staging / name).exists():
            os.replace(home / name, staging / name)
        if aside.exists():
            os.replace(aside, home / name)
        raise


def _flush_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            flush_file(Path(path, name))
        flush_folder(Path(path))


def _rotate(trainer: Any, home: Path) -> None:
    """Removes checkpoints beyond ``save_total_limit``: the oldest, but neither the last nor the best one."""
    if hasattr(trainer, "_rotate_checkpoints"):  # transformers 5.0 has it; newer ones leave it to those who derive
        trainer._rotate_checkpoints(use_mtime=True, output_dir=str(home))
        return
    limit = trainer.args.save_total_limit
    if limit is None or limit <= 0:
        return
    with contextlib.suppress(OSError):  # what cannot be removed now goes another time
        ordered = sorted(reversed(_checkpoints(home)), key=lambda folder: folder.stat().st_mtime_ns)
        kept = {*ordered[-1:], Path(trainer.state.best_model_checkpoint or home)}
        surplus = [folder for folder in ordered if folder not in kept][: max(len(ordered) - limit, 0)]
        if surplus:
            staging = Staging(home)  # out of its place in one move, so that no part of it is left there
            for folder in surplus:
                os.replace(folder, staging.path / folder.name)
            staging.close()


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """``disk_errors``, also for those that torch raises as RuntimeError while it saves.

    Args:
        folder: what is written.

    Raises:
        CheckpointError: there was one.
    """
    try:
        with disk_errors(folder):
            yield
    except RuntimeError as error:
        if not _is_of_saving(error):
            raise
        raise CheckpointError(f"could not write to {shown(folder)}: the disk is full or fails") from error


def _is_of_saving(error: RuntimeError) -> bool:
    """Whether it was raised where torch writes its files, whatever it says: by its streams, which are not in Python."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename == torch.serialization.__file__
