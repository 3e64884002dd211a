"""Changes the files of a folder all together or not at all.

A folder that is not there yet is made ready beside its place, flushed to the disk, and put there
in one move. In a folder that is there, the files are made ready in a hidden staging folder inside
it; then each moves to its place, in the order given. The first move is the moment from which the
new state counts. An error at any point moves the old files back and leaves no trace. If the
process dies between two moves, the staging folder holds the files that were still to move:
``staged`` finds them, so that a reader can pair them with the first file, and the next write into
the folder ends the work before it begins its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.inside import shown
from nbpeft.checkpoint.staging import ASIDE, OLD, Mark, Staging, flush_folder, sweep, take_back
from nbpeft.errors import CheckpointError, in_one_line

_SHOWN = 160


@dataclass(frozen=True)
class NewFile:
    """One file to put into a folder.

    Attributes:
        name: its name in the folder; ``sub/name`` for one in a folder inside it.
        write: writes it to the path it is given.
    """

    name: str
    write: Callable[[Path], object]

    @classmethod
    def of_text(cls, name: str, text: str) -> NewFile:
        """A text file, UTF-8, with the line ends it has."""
        return cls(name, lambda path: path.write_bytes(text.encode("utf-8")))

    @classmethod
    def copy_of(cls, path: Path, name: str | None = None) -> NewFile:
        """A file of the same content, by default of the same name."""
        return cls(name or path.name, lambda target: shutil.copyfile(path, target))


class _FolderAppeared(Exception):
    """Another process made the folder meanwhile."""


def replace_files(
    folder: Path, files: Sequence[NewFile], *, byte_count: int = 0, finish_others: bool = True
) -> dict[Path, int]:
    """Puts files into a folder, which is made if need be.

    Args:
        folder: where they go; other files in it are not touched.
        files: in the order in which they move to their places.
        byte_count: about how much they take, to refuse early when the disk is full.
        finish_others: whether a write that died after its first move is ended first, or else undone.

    Returns:
        The paths written, with their sizes in bytes.

    Raises:
        CheckpointError: the folder cannot be written; everything is as it was.
    """
    with disk_errors(folder, byte_count):
        try:
            return _replace_files(folder, files, byte_count, finish_others)
        except _FolderAppeared:
            return _replace_files(folder, files, byte_count, finish_others)


def _replace_files(folder: Path, files: Sequence[NewFile], byte_count: int, finish_others: bool) -> dict[Path, int]:
    new = not os.path.lexists(folder)
    home = folder.parent if new else folder
    made: list[Path] = []
    staging: Staging | None = None
    try:
        _make_folder(home, made)
        sweep(home, finish=finish_others or new)
        _check_space(home, byte_count)
        staging = Staging(home)
        marks = _write_all(staging, files, note=not new and len(files) > 1)
        if new:
            _move_folder(staging.path, folder, made)
        else:
            _move_all(staging, folder, marks, made)
    except BaseException:
        if staging is not None:
            staging.close()
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    staging.close()
    return {folder / name: size for name, (size, _) in marks.items()}


def _write_all(staging: Staging, files: Sequence[NewFile], *, note: bool) -> dict[str, Mark]:
    """Makes the files ready, with a note of the moves to come; returns what each is known by."""
    marks: dict[str, Mark] = {}
    folders = {staging.path}
    for file in files:
        path = staging.path / file.name
        if path.parent not in folders:
            path.parent.mkdir(parents=True)
            folders.add(path.parent)
        file.write(path)
        flush_file(path)
        found = os.stat(path)
        marks[file.name] = (found.st_size, found.st_mtime_ns)
    if note:
        staging.note_moves(marks)
    for path in folders:
        flush_folder(path)
    return marks


def _move_folder(staging: Path, folder: Path, made: Sequence[Path]) -> None:
    """Puts a whole new folder into its place."""
    try:
        os.replace(staging, folder)
        for path in dict.fromkeys([folder.parent, *(path.parent for path in reversed(made))]):
            flush_folder(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
            raise _FolderAppeared from None
        if not staging.exists():
            os.replace(folder, staging)
        raise


def _move_all(staging: Staging, folder: Path, marks: dict[str, Mark], made: list[Path]) -> None:
    """Moves files into place and flushes the folders; on an error moves back what was there."""
    for name in marks:
        made += inside.make_folders(folder, os.path.dirname(name))
        if inside.status(folder, name) is not None:
            old = f"{staging.path.name}/{OLD}/{name}"
            inside.make_folders(folder, os.path.dirname(old))
            inside.second_name(folder, name, old)
    try:
        for name in marks:
            inside.move(staging.path, name, folder, name)
        homes = [(folder / name).parent for name in marks]
        for path in dict.fromkeys([*homes, folder, *(path.parent for path in reversed(made))]):
            flush_folder(path)
    except BaseException:
        take_back(folder, staging.path.name, list(marks))
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Makes a folder with its parents; notes what was made, outermost first."""
    missing = []
    path = folder
    while not path.exists():
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        path.mkdir()
        made.append(path)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _check_space(folder: Path, byte_count: int) -> None:
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < byte_count:
            raise CheckpointError(_no_space(folder, byte_count), needed=byte_count, free=free)


@contextmanager
def in_place_of(folder: Path, *, allowed: bool) -> Iterator[None]:
    """Lets what the block writes be a folder of its own, in the place of one that is there; undone on an error.

    Args:
        folder: to be written.
        allowed: whether a folder with files may be replaced; one with folders in it never is.

    Raises:
        CheckpointError: something is there that may not be replaced.
    """
    with disk_errors(folder):
        sweep(folder.parent)  # what a process that died moved aside comes back
        found = os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()))
        if found and not allowed:
            raise CheckpointError(
                f"{shown(folder)} is there already; choose another folder, or replace it (overwrite=…)"
            )
        if found and (folder.is_symlink() or not folder.is_dir() or any(path.is_dir() for path in folder.iterdir())):
            raise CheckpointError(f"{shown(folder)} is more than a folder of files, and is not replaced")
    if not found:
        yield
        return
    with disk_errors(folder):
        staging = Staging(folder.parent)
    aside = staging.path / ASIDE / folder.name
    try:
        with disk_errors(folder):
            aside.parent.mkdir()
            os.replace(folder, aside)
        yield
    except BaseException:
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise
    finally:
        staging.close()


def flush_file(path: Path) -> None:
    """Brings what a file holds to the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def disk_errors(folder: Path, byte_count: int = 0) -> Iterator[None]:
    """Reports an error of the system while a folder is written in one line.

    Args:
        folder: what is written.
        byte_count: about how much it takes, or 0.

    Raises:
        CheckpointError: there was one.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        raise _translated(error, folder, byte_count) from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise _translated(error, folder, byte_count) from error


def _translated(error: Exception, folder: Path, byte_count: int) -> CheckpointError:
    number = error.errno if isinstance(error, OSError) else None
    # safetensors reports the system's errors as text.
    if number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
        return CheckpointError(_no_space(folder, byte_count), needed=byte_count)
    if number in (errno.ENOTDIR, errno.EEXIST):
        return CheckpointError(f"{shown(folder)} is not a folder: a file of that name is in the way")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        place = getattr(error, "filename", None)
        return CheckpointError(
            f"no permission to write {shown(place if isinstance(place, str) else folder)}; nothing was changed"
        )
    reason = in_one_line(getattr(error, "strerror", None) or error)[:_SHOWN]
    return CheckpointError(f"could not write to {shown(folder)}: {reason}; nothing was changed")


def _no_space(folder: Path, byte_count: int) -> str:
    free = ""
    with contextlib.suppress(OSError):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = f", {shutil.disk_usage(place).free / 1e6:.4g} MB are free"
    needed = f": {byte_count / 1e6:.4g} MB are needed{free}" if byte_count else ""
    return f"no space left on the disk for {shown(folder)}{needed}; nothing was changed"
