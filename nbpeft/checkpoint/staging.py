"""Hidden folders in which files are made ready before they move to their places.

A staging folder is locked for as long as its process lives. One that is not locked belongs to a
process that died: the next write beside it sweeps it away at once. What had been moved out of it
already decides what became of the write: with its first file in place the new state counts, and
the sweep moves the others after it (or takes the first ones back, where the caller wants that).

File systems that cannot lock folders (NFS, Windows) leave only the age to judge by.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from nbpeft.errors import CheckpointError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STAGING_PREFIX = ".nbpeft-"
OLD = ".old"
"""Folder inside a staging folder with the files whose places others take."""
ASIDE = ".aside"
"""The same for whole folders; one whose place is still empty goes back when the write died."""

_MOVES = ".moves"
_NAME = re.compile(r"\.nbpeft-[0-9a-f]{16}")
_STALE_SECONDS = 86_400.0
_TRIES = 5

Mark = tuple[int, int]
"""Bytes and time of change of a file, by which it is known again."""


def staging_name() -> str:
    """A name for a staging folder that nobody else has."""
    return f"{STAGING_PREFIX}{secrets.token_hex(8)}"


class Staging:
    """A new staging folder, locked.

    Args:
        parent: the folder it is made in.
        name: its name; by default one that nobody else has.
        mode: permissions, as for ``os.mkdir``.

    Attributes:
        path: where it is.
    """

    def __init__(self, parent: Path, name: str | None = None, mode: int = 0o777) -> None:
        for _ in range(_TRIES):
            self.path = parent / (name or staging_name())
            os.mkdir(self.path, mode)
            try:
                self._lock = lock_folder(self.path)
                return
            except (BlockingIOError, FileNotFoundError):
                continue  # a sweep came between the two calls
            except BaseException:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        raise CheckpointError(f"{parent} is being cleared by another process; try again")

    def close(self) -> None:
        """Removes the folder, unless it was moved, and gives the lock back."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def note_moves(self, marks: dict[str, Mark]) -> None:
        """Writes down which files are about to move, in this order, so that a sweep can end the work."""
        with open(self.path / _MOVES, "wb") as file:
            file.write(json.dumps(marks).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files; those of processes that died are removed."""
    parent = Path(tempfile.gettempdir())
    sweep(parent)
    try:
        staging = Staging(parent, mode=0o700)
    except OSError as error:
        raise CheckpointError(f"no temporary folder can be made in {parent}: {error.strerror}") from error
    try:
        yield staging.path
    finally:
        staging.close()


def staged(folder: Path, name: str) -> Iterator[Path]:
    """Files of that name which a write that died had still to move."""
    try:
        entries = sorted(entry for entry in os.listdir(folder) if _NAME.fullmatch(entry))
    except OSError:
        return
    for entry in entries:
        path = folder / entry / name
        if path.is_file():
            yield path


def sweep(folder: Path, *, finish: bool = True) -> None:
    """Clears up after writes into a folder, or beside it, that died half-way.

    Args:
        folder: what the writes were about.
        finish: move what was still to move, where the first file had moved; else take back what had.
    """
    try:
        entries = [entry for entry in os.listdir(folder) if _NAME.fullmatch(entry)]
    except OSError:
        return
    for entry in entries:
        # What cannot be cleared now goes another time; the write that asks for it must not fail by that.
        with contextlib.suppress(OSError):
            _sweep_one(folder / entry, folder, finish)


def _sweep_one(path: Path, folder: Path, finish: bool) -> None:
    found = os.lstat(path)
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return
    lock = lock_folder(path)
    try:
        if lock is None and time.time() - found.st_mtime < _STALE_SECONDS:
            return
        _settle(path, folder, finish)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _settle(staging: Path, folder: Path, finish: bool) -> None:
    """Ends the moves of a write that died after the first of them, or takes them back."""
    for path in (staging / ASIDE).glob("*"):
        if not os.path.lexists(folder / path.name):
            os.replace(path, folder / path.name)
    marks = _noted_moves(staging)
    moved = [name for name in marks if not (staging / name).exists() and mark_of(folder / name) == marks[name]]
    if not moved or moved[0] != next(iter(marks)) or len(moved) == len(marks):
        return
    if finish:
        for name in marks:
            if (staging / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, folder / name)
    else:
        take_back(staging, folder, moved)
    flush_folder(folder)


def take_back(staging: Path, folder: Path, names: list[str]) -> None:
    """Puts the files back whose places others took, and removes those where there was none."""
    for name in reversed(names):
        if (staging / name).exists():
            continue  # it has not moved
        old = staging / OLD / name
        if old.exists() or old.is_symlink():
            os.replace(old, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def mark_of(path: Path) -> Mark | None:
    """What a file is known by, or None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def flush_folder(folder: Path) -> None:
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


def _noted_moves(staging: Path) -> dict[str, Mark]:
    """What ``note_moves`` wrote; nothing where it is not whole, or names files elsewhere."""
    try:
        noted = json.loads((staging / _MOVES).read_text(encoding="utf-8"))
        marks = {str(name): (int(size), int(when)) for name, (size, when) in noted.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in marks)
    return marks if inside else {}


def lock_folder(path: Path) -> int | None:
    """A handle that holds the lock of a folder; None where folders cannot be locked.

    Raises:
        BlockingIOError: another process or thread holds it.
        FileNotFoundError: the folder is gone.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException as error:
        os.close(handle)
        if not isinstance(error, OSError) or isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
