"""Changes the files of a folder all together or not at all.

Everything is written into a hidden staging folder inside the target and flushed to the disk.
Then each file moves to its place, in the order given; the first move is the moment from which the
new state counts. An error at any point moves the old files back and leaves no trace. If the
process dies between two moves, the staging folder stays and holds the files that were still to
move: ``staged`` finds them, so that a reader can pair them with the first file, and a later
write sweeps the folder up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbpeft.errors import CheckpointError, NbpeftError

STAGING_PREFIX = ".nbpeft-"
_OLD = "old-"
_STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class NewFile:
    """One file to put into a folder.

    Attributes:
        name: its name in the folder.
        write: writes it to the path it is given.
    """

    name: str
    write: Callable[[Path], None]

    @classmethod
    def of_text(cls, name: str, text: str) -> NewFile:
        """A text file, UTF-8, with the line ends it has."""
        return cls(name, lambda path: _write_bytes(path, text.encode("utf-8")))


def replace_files(folder: Path, files: Sequence[NewFile], *, byte_count: int = 0) -> list[Path]:
    """Puts files into a folder, which is made if need be.

    Args:
        folder: where they go; other files in it are not touched.
        files: in the order in which they move to their places.
        byte_count: about how much they take, to refuse early when the disk is full.

    Returns:
        The paths written.

    Raises:
        CheckpointError: the folder cannot be written; everything is as it was.
    """
    made: list[Path] = []
    staging = folder / f"{STAGING_PREFIX}{secrets.token_hex(8)}"
    try:
        _make_folder(folder, made)
        _check_space(folder, byte_count)
        staging.mkdir()
        for file in files:
            file.write(staging / file.name)
            _flush(staging / file.name)
        _flush_folder(staging)
        _move_all(staging, folder, [file.name for file in files], flushed=[folder, *(path.parent for path in made)])
    except BaseException as error:
        _discard(staging)
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, NbpeftError) or not isinstance(error, Exception):
            raise
        raise _translated(error, folder, byte_count) from error
    _discard(staging)
    _sweep(folder)
    return [folder / file.name for file in files]


def staged(folder: Path, name: str) -> Iterator[Path]:
    """Files of that name which a write that died had still to move."""
    try:
        entries = sorted(entry for entry in os.listdir(folder) if entry.startswith(STAGING_PREFIX))
    except OSError:
        return
    for entry in entries:
        path = folder / entry / name
        if path.is_file():
            yield path


def _move_all(staging: Path, folder: Path, names: Sequence[str], flushed: Sequence[Path]) -> None:
    """Moves files into place and flushes the folders; on an error moves back what was there."""
    for name in names:
        if (folder / name).exists():
            _keep(folder / name, staging / f"{_OLD}{name}")
    moved: list[str] = []
    try:
        for name in names:
            os.replace(staging / name, folder / name)
            moved.append(name)
        for path in flushed:
            _flush_folder(path)
    except BaseException:
        for name in reversed(moved):
            old = staging / f"{_OLD}{name}"
            if old.exists():
                os.replace(old, folder / name)
            else:
                (folder / name).unlink()
        raise


def _keep(path: Path, backup: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(path, backup, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, backup, follow_symlinks=False)


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


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _flush(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes moves in a folder last. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems refuse to flush folders; there is nothing more to do on them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        os.close(handle)


def _discard(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes staging folders of writes that died long ago."""
    for entry in folder.glob(f"{STAGING_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                _discard(entry)


def _translated(error: Exception, folder: Path, byte_count: int) -> CheckpointError:
    number = error.errno if isinstance(error, OSError) else None
    # safetensors reports the system's errors as text.
    if number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
        return CheckpointError(_no_space(folder, byte_count), needed=byte_count)
    if number in (errno.ENOTDIR, errno.EEXIST):
        return CheckpointError(f"{folder} is not a folder: a file of that name is in the way")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(f"no permission to write {error.filename or folder}; nothing was changed")  # type: ignore[attr-defined]
    return CheckpointError(f"could not write to {folder}: {error}; nothing was changed")


def _no_space(folder: Path, byte_count: int) -> str:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(place).free / 1e6:.4g} MB are free"
    needed = f": {byte_count / 1e6:.4g} MB are needed{free}" if byte_count else ""
    return f"no space left on the disk for {folder}{needed}; nothing was changed"
