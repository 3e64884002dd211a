"""Hidden folders in which files are made ready before they move to their places.

A staging folder is locked for as long as its process lives. One that is not locked belongs to a
process that died: the next write beside it sweeps it away at once. What had been moved out of it
already decides what became of the write: with its first file in place the new state counts, and
the sweep moves the others after it (or takes the first ones back, where the caller wants that).

Only what this user's processes made is swept: the name of a staging folder ends in a code that is made of the folder
it is in and a key in the user's home. One that came with a folder of somebody else (cloned, unpacked) has no such
name; it is reported and left alone.

File systems that cannot lock folders (NFS, Windows) leave only the age to judge by.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from nbpeft.checkpoint import inside
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
_NAME = re.compile(r"\.nbpeft-([0-9a-f]{16})([0-9a-f]{16})?")
_KEY_BYTES = 32
_MOST_MOVES = 2**24
"""Bytes of a note of moves, at most."""
_STALE_SECONDS = 86_400.0
_TRIES = 5

Mark = tuple[int, int]
"""Bytes and time of change of a file, by which it is known again."""


def staging_name(parent: Path) -> str:
    """A name for a staging folder that nobody else has, and that only this user can give.

    Args:
        parent: the folder it is to be made in.

    Raises:
        OSError: there is no such folder.
    """
    token = secrets.token_hex(8)
    return f"{STAGING_PREFIX}{token}{_code(parent, token)}"


def is_own(parent: Path, name: str) -> bool:
    """Whether a name in a folder is one that ``staging_name`` gave for it to a process of this user."""
    found = _NAME.fullmatch(name)
    return found is not None and hmac.compare_digest(found[2] or "", _code(parent, found[1]))


def _code(parent: Path, token: str) -> str:
    # The folder's number goes in: a copy of the folder, at whose files somebody else may have been, has another one.
    text = f"{token} {os.stat(parent).st_ino}"
    return hmac.new(_key(), text.encode(), hashlib.sha256).hexdigest()[:16]


@functools.cache
def _key() -> bytes:
    """A key that only this user's processes know; where the home cannot be written, only this process."""
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "nbpeft"
    with contextlib.suppress(OSError, RuntimeError):
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "key").exists():
            handle, made = tempfile.mkstemp(dir=home)
            with open(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            with contextlib.suppress(OSError):  # another process was faster, or there are no second names here
                os.link(made, home / "key")
            with contextlib.suppress(OSError):
                os.unlink(made) if (home / "key").exists() else os.replace(made, home / "key")
        key = (home / "key").read_bytes()
        if len(key) == _KEY_BYTES:
            return key
    return secrets.token_bytes(_KEY_BYTES)


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
            self.path = parent / (name or staging_name(parent))
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
    sweep(parent, report=False)
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
        if inside.is_file(folder, f"{entry}/{name}"):
            yield folder / entry / name


def sweep(folder: Path, *, finish: bool = True, report: bool = True) -> None:
    """Clears up after writes into a folder, or beside it, that died half-way.

    Args:
        folder: what the writes were about.
        finish: move what was still to move, where the first file had moved; else take back what had.
        report: warn of staging folders that no process of this user made.
    """
    try:
        entries = [entry for entry in os.listdir(folder) if _NAME.fullmatch(entry)]
    except OSError:
        return
    for entry in entries:
        # What cannot be cleared now goes another time; the write that asks for it must not fail by that.
        with contextlib.suppress(OSError, CheckpointError):
            if not _sweep_one(folder, entry, finish) and report:
                warnings.warn(
                    f"{inside.shown(folder / entry)} looks like what an interrupted write left, but not one of yours: "
                    "it was not touched; delete it if you do not need it",
                    stacklevel=2,
                )


def _sweep_one(folder: Path, entry: str, finish: bool) -> bool:
    """Clears one staging folder up; returns False where it is none of this user's."""
    path, found = folder / entry, os.lstat(folder / entry)
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return True  # they sweep their own
    if not is_own(folder, entry) or not stat.S_ISDIR(found.st_mode):
        return _is_locked(path)
    lock = lock_folder(path)
    try:
        if lock is None and time.time() - found.st_mtime < _STALE_SECONDS:
            return True
        _settle(folder, entry, finish)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)
    return True


def _is_locked(path: Path) -> bool:
    """Whether a process is at work in it, one that could not read the key."""
    try:
        lock = lock_folder(path)
    except BlockingIOError:
        return True
    if lock is not None:
        os.close(lock)
    return False


def _settle(folder: Path, entry: str, finish: bool) -> None:
    """Ends the moves of a write that died after the first of them, or takes them back."""
    for name in inside.names(folder, f"{entry}/{ASIDE}"):
        if inside.status(folder, name) is None:
            inside.move(folder, f"{entry}/{ASIDE}/{name}", folder, name)
    marks = _noted_moves(folder, entry)
    moved = [name for name in marks if not _waits(folder, entry, name) and mark_of(folder, name) == marks[name]]
    if not moved or moved[0] != next(iter(marks)) or len(moved) == len(marks):
        return
    if finish:
        for name in marks:
            if _waits(folder, entry, name):
                inside.make_folders(folder, os.path.dirname(name))
                inside.move(folder, f"{entry}/{name}", folder, name)
    else:
        take_back(folder, entry, moved)
    flush_folder(folder)


def _waits(folder: Path, entry: str, name: str) -> bool:
    """Whether a file has still to move."""
    return inside.status(folder, f"{entry}/{name}") is not None


def take_back(folder: Path, entry: str, names: list[str]) -> None:
    """Puts the files back whose places others took, and removes those where there was none.

    Args:
        folder: where the files are.
        entry: name of the staging folder in it that they came from.
        names: of the files.
    """
    for name in reversed(names):
        if _waits(folder, entry, name):
            continue  # it has not moved
        if inside.status(folder, f"{entry}/{OLD}/{name}") is not None:
            inside.move(folder, f"{entry}/{OLD}/{name}", folder, name)
        else:
            inside.remove(folder, name)


def mark_of(folder: Path, name: str) -> Mark | None:
    """What a file in a folder is known by, or None if there is none."""
    found = inside.status(folder, name)
    return None if found is None else (found.st_size, found.st_mtime_ns)


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


def _noted_moves(folder: Path, entry: str) -> dict[str, Mark]:
    """What ``note_moves`` wrote; nothing where it is not whole."""
    try:
        noted = json.loads(inside.read_plain(folder, f"{entry}/{_MOVES}", _MOST_MOVES))
        return {str(name): (int(size), int(when)) for name, (size, when) in noted.items()}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return {}


def lock_folder(path: Path) -> int | None:
    """A handle that holds the lock of a folder; None where folders cannot be locked, and for what is no folder.

    Raises:
        BlockingIOError: another process or thread holds it.
        FileNotFoundError: the folder is gone.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return None
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.lstat(path)):
            return handle
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException as error:
        os.close(handle)
        if not isinstance(error, OSError) or isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
