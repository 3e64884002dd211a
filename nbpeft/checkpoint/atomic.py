"""Atomic updates of several files in a folder: either all of them change or none does.

A new folder is written under a temporary name next to its final place, flushed to disk, and renamed
once. For an existing folder, the files are written to a hidden staging folder inside it and then
renamed into place one by one, in the given order. The first rename commits the write. An error at
any point restores the old files and removes the staging folder. If the process dies between two
renames, the remaining files are still in the staging folder: ``staged`` finds them, so that a reader
can pair them with the file that was already renamed, and the next write into the folder first
finishes the interrupted one.
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
from nbpeft.checkpoint.staging import ASIDE, OLD, Mark, Staging, flush_each, flush_folder, make_folder, sweep, take_back
from nbpeft.errors import CheckpointError, in_one_line

_SHOWN = 160


@dataclass(frozen=True)
class NewFile:
    """One file to write into a folder.

    Attributes:
        name: path relative to the folder, e.g. ``config.json`` or ``sub/name``.
        write: called with a path; writes the content there.
    """

    name: str
    write: Callable[[Path], object]

    @classmethod
    def of_text(cls, name: str, text: str) -> NewFile:
        """Returns a UTF-8 text file; line endings are written as they are in ``text``.

        Args:
            name: path relative to the folder.
            text: the content.
        """
        return cls(name, lambda path: path.write_bytes(text.encode("utf-8")))

    @classmethod
    def copy_of(cls, path: Path, name: str | None = None) -> NewFile:
        """Returns a copy of an existing file.

        Args:
            path: the file to copy.
            name: path of the copy relative to the folder; by default the file's own name.
        """
        return cls(name or path.name, lambda target: shutil.copyfile(path, target))


class _FolderAppeared(Exception):
    """Another process created the folder in the meantime."""


def replace_files(
    folder: Path, files: Sequence[NewFile], *, byte_count: int = 0, finish_others: bool = True
) -> dict[Path, int]:
    """Writes files into a folder atomically, creating the folder if needed.

    Args:
        folder: the target; its other files are not touched.
        files: the files, in the order in which they are renamed into place.
        byte_count: approximate total size in bytes, so that a full disk is reported before anything is written.
        finish_others: whether to finish a write that a dead process left after its first rename; False undoes it.

    Returns:
        Each written path with its size in bytes.

    Raises:
        CheckpointError: the folder cannot be written; nothing was changed.
    """
    with disk_errors(folder, byte_count):
        try:
            return _replace_files(folder, files, byte_count, finish_others)
        except _FolderAppeared:  # so it is not new any more, and its other files are kept
            return _replace_files(folder, files, byte_count, finish_others)


def _replace_files(folder: Path, files: Sequence[NewFile], byte_count: int, finish_others: bool) -> dict[Path, int]:
    new = not inside.is_there(folder)
    home = folder.parent if new else folder
    made: list[Path] = []
    staging: Staging | None = None
    try:
        make_folder(home, made)
        sweep(home, finish=finish_others or new)
        _check_space(home, byte_count)
        staging = Staging(home)
        marks = _write_all(staging, files, note=not new and len(files) > 1)
        if new:
            _move_folder(staging.path, folder)
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
    """Writes the files into the staging folder, with a log of the pending renames; returns each file's mark."""
    marks: dict[str, Mark] = {}
    for file in files:
        path = staging.path / file.name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        file.write(path)
        # Before it is renamed: after a power loss, a renamed file could otherwise be empty.
        flush_file(path)
        found = os.stat(path)
        marks[file.name] = (found.st_size, found.st_mtime_ns)
    if note:
        staging.note_moves(marks)
    return marks


def _move_folder(staging: Path, folder: Path) -> None:
    """Renames the staging folder to the new folder, and undoes that on an error."""
    _flush_folders(staging)
    try:
        os.replace(staging, folder)
        flush_folder(folder.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
            raise _FolderAppeared from None
        if not inside.is_there(staging):
            os.replace(folder, staging)
        raise


def _move_all(staging: Staging, folder: Path, marks: dict[str, Mark], made: list[Path]) -> None:
    """Renames files into place and flushes the folders; on an error restores the previous files."""
    for name in marks:
        made += inside.make_folders(folder, os.path.dirname(name))
        if inside.status(folder, name) is not None:
            old = f"{staging.path.name}/{OLD}/{name}"
            inside.make_folders(folder, os.path.dirname(old))
            inside.second_name(folder, name, old)
    homes = [(folder / name).parent for name in marks]
    if len(marks) > 1:  # what a recovery needs is on disk before the first rename
        _flush_folders(staging.path)
        flush_each(path.parent for path in made)
    try:
        for number, name in enumerate(marks):
            # The first rename commits, and programs that do not know staging folders begin with the last file: the
            # renames after the first and before the last may reach the disk in any order.
            if number > 0 and number in (1, len(marks) - 1):
                flush_each(homes)
            inside.move(staging.path, name, folder, name)
        flush_each(homes)
    except BaseException:
        take_back(folder, staging.path.name, list(marks))
        raise


def _flush_folders(folder: Path) -> None:
    flush_each(Path(path) for path, _, _ in os.walk(folder))


def _check_space(folder: Path, byte_count: int) -> None:
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < byte_count:
            raise CheckpointError(_no_space(folder, byte_count), needed=byte_count, free=free)


@contextmanager
def in_place_of(folder: Path, *, allowed: bool) -> Iterator[Path]:
    """Replaces an existing folder by one that the block writes, once it is complete.

    Args:
        folder: the folder.
        allowed: whether an existing folder of files may be replaced. A folder with subfolders never is.

    Yields:
        Where the block writes the new folder.

    Raises:
        CheckpointError: the path exists and may not be replaced.
    """
    with disk_errors(folder):
        sweep(folder.parent)  # restores a folder that a dead process had moved away
        found = inside.is_there(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()))
        if found and not allowed:
            raise CheckpointError(f"{shown(folder)} already exists; choose another folder, or replace it (replace=…)")
        if found and (folder.is_symlink() or not folder.is_dir() or any(path.is_dir() for path in folder.iterdir())):
            raise CheckpointError(f"{shown(folder)} is not just a folder of files, and is not replaced")
    if not found:
        yield folder
        return
    with disk_errors(folder), new_folder(folder.parent, folder.name) as place:
        yield place


@contextmanager
def new_folder(home: Path, name: str) -> Iterator[Path]:
    """Creates or replaces a folder by one that the block writes, once it is complete and on disk.

    Args:
        home: an existing folder.
        name: name of the folder in it.

    Yields:
        Where the block writes the folder.

    Raises:
        OSError: it cannot be written; nothing was changed.
    """
    sweep(home)
    staging = Staging(home)
    try:
        yield staging.path / name
        put_folder(staging, home, name)
    except CheckpointError as error:  # the message names the folder that is replaced, not the one that is removed
        error.message = error.message.replace(f"{os.sep}{staging.path.name}", "")
        raise
    finally:
        staging.close()


def put_folder(staging: Staging, home: Path, name: str) -> None:
    """Moves a folder from a staging folder to its place, and an existing one of the same name the other way.

    Args:
        staging: the staging folder, in ``home``.
        home: where the new folder is moved.
        name: its name in both places.

    Raises:
        OSError: it cannot be moved; nothing was changed.
    """
    written, aside = staging.path / name, staging.path / ASIDE / name
    flush_tree(written)
    written.lstat()  # fails if nothing was written, before anything is moved
    try:
        if inside.is_there(home / name):
            aside.parent.mkdir()
            os.replace(home / name, aside)
        os.replace(written, home / name)
        flush_folder(home)
    except BaseException:
        if not inside.is_there(written):
            os.replace(home / name, written)
        if inside.is_there(aside):
            os.replace(aside, home / name)
        raise


def flush_file(path: Path) -> None:
    """Flushes a file's content to disk (``fsync``)."""
    with open(path, "r+b" if os.name == "nt" else "rb") as file:  # others flush files that may only be read, too
        os.fsync(file.fileno())


def flush_tree(folder: Path) -> None:
    """Flushes a folder and everything in it to disk; links are not followed."""
    for path, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(path, name)):
                flush_file(Path(path, name))
        flush_folder(Path(path))


@contextmanager
def disk_errors(folder: Path, byte_count: int = 0) -> Iterator[None]:
    """Turns an operating-system error raised while writing a folder into one clear line.

    Args:
        folder: the folder that is written.
        byte_count: approximate size of the write in bytes, or 0 if unknown.

    Raises:
        CheckpointError: the block raised such an error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        raise _translated(error, folder, byte_count) from error
    except ValueError as error:
        if "embedded null" not in str(error):  # "byte" or, since Python 3.13, "character in path"
            raise
        raise _translated(error, folder, byte_count) from error
    except Exception as error:
        if type(error) is not Exception or "(os error " not in str(error):  # tokenizers' only kind
            raise
        raise _translated(error, folder, byte_count) from error


def _translated(error: Exception, folder: Path, byte_count: int) -> CheckpointError:
    number = error.errno if isinstance(error, OSError) else None
    # safetensors raises SafetensorError without an errno: the code is only in its text.
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
