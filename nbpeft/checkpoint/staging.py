"""Staging folders: hidden folders in which files are written before they are renamed into place.

A process locks its staging folder for as long as it lives. An unlocked one belongs to a process that died, and the next
write in the same folder cleans it up. If the first file had already been renamed into place, the new state counts: the
sweep renames the remaining files too, or, if the caller asks for it, restores the old ones.

Only staging folders that were created where they are now are swept: their names end in a code computed from the inode
number of their parent. A staging folder among somebody else's files (cloned, unpacked) does not have a valid name, as
nobody knows that number before the files are written; it is reported and not touched.

On file systems that cannot lock folders (NFS, Windows), only the age of a staging folder shows that it is abandoned.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
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
"""Folder inside a staging folder with hard links to the files that are replaced."""
ASIDE = ".aside"
"""Folder inside a staging folder with whole folders that are being replaced. After an interrupted write, a folder is
moved back if no new one has taken its place."""

_MOVES = ".moves"
_NAME = re.compile(r"\.nbpeft-([0-9a-f]{16})([0-9a-f]{16})")
_MOST_MOVES = 2**24
"""Largest size in bytes of the log of pending renames."""
_STALE_SECONDS = 86_400.0
_TRIES = 5
_LONGEST_PROBE = 1.0
"""The most seconds for which locking a folder waits while others only ask whether it is locked."""

Mark = tuple[int, int]
"""Size in bytes and modification time in ns of a file, which identify it."""


def staging_name(parent: Path) -> str:
    """Returns a unique name for a staging folder, which is valid in its parent alone.

    Args:
        parent: the folder in which it will be created.

    Raises:
        OSError: there is no such folder.
    """
    token = secrets.token_hex(8)
    return f"{STAGING_PREFIX}{token}{_code(parent, token)}"


def is_own(parent: Path, name: str) -> bool:
    """Returns whether a name was generated with ``staging_name`` for this folder.

    Args:
        parent: the folder of the entry.
        name: name of the entry.
    """
    found = _NAME.fullmatch(name)
    return found is not None and found[2] == _code(parent, found[1])


def _code(parent: Path, token: str) -> str:
    return hashlib.sha256(f"{token} {os.stat(parent).st_ino}".encode()).hexdigest()[:16]


class Staging:
    """A new, locked staging folder.

    Args:
        parent: the folder in which it is created.
        name: its name; by default a unique one.
        mode: permissions, as for ``os.mkdir``.

    Attributes:
        path: its path.
    """

    def __init__(self, parent: Path, name: str | None = None, mode: int = 0o777) -> None:
        for _ in range(_TRIES):
            self.path = parent / (name or staging_name(parent))
            os.mkdir(self.path, mode)
            try:
                self._lock = lock_folder(self.path)
                return
            except (BlockingIOError, FileNotFoundError):
                continue  # another process swept the folder before it was locked
            except BaseException:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        raise CheckpointError(f"{parent} is being cleared by another process; try again")

    def close(self) -> None:
        """Removes the folder, unless it was renamed into place, and releases the lock."""
        with contextlib.suppress(OSError):  # up to Python 3.12, rmtree does not ignore all errors
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def note_moves(self, marks: dict[str, Mark]) -> None:
        """Logs the pending renames in order, so that a sweep can finish or undo them.

        Args:
            marks: name of a file -> its mark.
        """
        with open(self.path / _MOVES, "wb") as file:
            file.write(json.dumps(marks).encode("utf-8"))
            file.flush()
            # On disk before the first rename, or a sweep after a power loss would not know which renames are missing.
            os.fsync(file.fileno())


def discard(home: Path, names: Sequence[str]) -> None:
    """Removes files and folders; each is moved away in one step first, so that no part of it is left.

    Args:
        home: the folder that contains them.
        names: their paths relative to it.

    Raises:
        CheckpointError: a folder of a path is a link.
        OSError: one cannot be removed.
    """
    if not names:
        return
    staging = Staging(home)
    try:
        for number, name in enumerate(names):
            inside.move(home, name, staging.path, str(number))
        # Else a folder could be back after a loss of power, without some of its files.
        flush_each((home / name).parent for name in names)
    finally:
        staging.close()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Creates a temporary folder for the block; removes those of dead processes first.

    Raises:
        CheckpointError: no folder can be created.
    """
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
    """Yields files of a name that an interrupted write had not yet renamed into place, and those that it replaces.

    Args:
        folder: the target folder of the write.
        name: path of the file relative to it.
    """
    try:
        entries = sorted(entry for entry in os.listdir(folder) if _NAME.fullmatch(entry))
    except OSError:
        return
    for entry in entries:
        for place in (f"{entry}/{name}", f"{entry}/{OLD}/{name}"):
            with contextlib.suppress(OSError):
                if inside.is_file(folder, place):
                    yield folder / place


def sweep(folder: Path, *, finish: bool = True, report: bool = True) -> None:
    """Cleans up after interrupted writes whose staging folders are in a folder.

    Args:
        folder: the folder to clean up.
        finish: finish a write whose first file was already renamed into place; False restores the old files.
        report: warn about staging folders that were not created there.
    """
    try:
        entries = [entry for entry in os.listdir(folder) if _NAME.fullmatch(entry)]
    except OSError:
        return
    for entry in entries:
        # A failed cleanup is tried again by the next write; it must not make this one fail.
        with contextlib.suppress(OSError, CheckpointError):
            if not _sweep_one(folder, entry, finish) and report:
                warnings.warn(
                    f"{inside.shown(folder / entry)} looks like the remains of an interrupted write into another "
                    "folder: it was not touched; delete it if you do not need it",
                    stacklevel=2,
                )


def _sweep_one(folder: Path, entry: str, finish: bool) -> bool:
    """Cleans up one staging folder; returns False if it was not created there."""
    path, found = folder / entry, os.lstat(folder / entry)
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return True  # its owner's processes sweep it
    if not is_own(folder, entry) or not stat.S_ISDIR(found.st_mode):
        return _is_locked(path)
    lock = lock_folder(path)
    try:
        if lock is None and time.time() - found.st_mtime < _STALE_SECONDS:
            return True
        _recover(folder, entry, finish)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)
    return True


def _is_locked(path: Path) -> bool:
    """Returns whether a live process uses a staging folder."""
    try:
        lock = probe_lock(path)
    except BlockingIOError:
        return True
    if lock is not None:
        os.close(lock)
    return False


def _recover(folder: Path, entry: str, finish: bool) -> None:
    """Finishes or undoes the renames of a write that died after the first of them."""
    for name in inside.names(folder, f"{entry}/{ASIDE}"):
        if inside.status(folder, name) is None:
            inside.move(folder, f"{entry}/{ASIDE}/{name}", folder, name)
    marks = _noted_moves(folder, entry)
    moved = [name for name in marks if not _is_pending(folder, entry, name) and mark_of(folder, name) == marks[name]]
    if not moved or moved[0] != next(iter(marks)) or len(moved) == len(marks):
        return
    if finish:
        for name in marks:
            if _is_pending(folder, entry, name):
                inside.make_folders(folder, os.path.dirname(name))
                inside.move(folder, f"{entry}/{name}", folder, name)
    else:
        take_back(folder, entry, moved)
    flush_each(path for path in (*((folder / name).parent for name in marks), folder) if path.is_dir())


def _is_pending(folder: Path, entry: str, name: str) -> bool:
    """Returns whether a file has not been renamed into place yet."""
    return inside.status(folder, f"{entry}/{name}") is not None


def take_back(folder: Path, entry: str, names: list[str]) -> None:
    """Undoes renames: restores replaced files and removes new ones.

    Args:
        folder: folder of the files.
        entry: name of the staging folder in it.
        names: paths of the files relative to ``folder``.
    """
    for name in reversed(names):
        if _is_pending(folder, entry, name):
            continue  # not renamed yet
        if inside.status(folder, f"{entry}/{OLD}/{name}") is not None:
            inside.move(folder, f"{entry}/{OLD}/{name}", folder, name)
        else:
            inside.remove(folder, name)


def mark_of(folder: Path, name: str) -> Mark | None:
    """Returns the mark of a file, or None if it does not exist.

    Args:
        folder: folder of the file.
        name: path of the file relative to it.
    """
    found = inside.status(folder, name)
    return None if found is None else (found.st_size, found.st_mtime_ns)


def flush_folder(folder: Path) -> None:
    """Flushes the entries of a folder to disk, so that renames in it survive a crash.

    Windows has no such call and does not need it.
    """
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Some network file systems refuse to flush folders; nothing else can be done there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def flush_each(folders: Iterable[Path]) -> None:
    """Flushes the entries of several folders to disk, each once."""
    for path in dict.fromkeys(folders):
        flush_folder(path)


def make_folder(folder: Path, made: list[Path]) -> None:
    """Creates a folder with its parents, so that they survive a crash.

    Args:
        folder: the folder; may exist.
        made: every created folder is appended, outermost first.

    Raises:
        OSError: it cannot be created, or is a file.
    """
    missing = []
    path = folder
    while not path.exists():
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.mkdir()
            made.append(path)
        flush_folder(path.parent)
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _noted_moves(folder: Path, entry: str) -> dict[str, Mark]:
    """Returns the renames logged by ``note_moves``; empty if there is no log, or an incomplete one."""
    try:
        noted = json.loads(inside.read_plain(folder, f"{entry}/{_MOVES}", _MOST_MOVES))
        return {str(name): (int(size), int(when)) for name, (size, when) in noted.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return {}


def lock_folder(path: Path) -> int | None:
    """Locks a folder without waiting for another lock; ``probe_lock`` holds it up for a moment only.

    Returns:
        A descriptor; closing it releases the lock. None if folders cannot be locked here, or it is not a folder.

    Raises:
        BlockingIOError: another process or thread has the lock.
        FileNotFoundError: the folder was removed.
        OSError: the folder cannot be looked at.
    """
    until = time.monotonic() + _LONGEST_PROBE
    while True:
        try:
            return _lock(path, shared=False)
        except BlockingIOError:
            probe = probe_lock(path)  # raises the error, unless only probes are in the way
            if probe is not None:
                os.close(probe)
            if time.monotonic() > until:
                raise
        time.sleep(0.001)


def probe_lock(path: Path) -> int | None:
    """Finds out whether a folder is locked, with a shared lock: several processes may do it at once.

    Returns:
        A descriptor, which has to be closed at once. None if folders cannot be locked here, or it is not a folder.

    Raises:
        BlockingIOError: another process or thread has locked the folder.
        FileNotFoundError: the folder was removed.
        OSError: the folder cannot be looked at.
    """
    return _lock(path, shared=True)


def _lock(path: Path, *, shared: bool) -> int | None:
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return None
        raise
    locked = False
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        locked = True
        if os.path.samestat(os.fstat(handle), os.lstat(path)):
            return handle
        # Between open and lock another process swept the folder: the lock is on a folder that has no name any more.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException as error:
        os.close(handle)
        # Without its lock a folder would be swept as that of a dead process: only a file system may refuse locks.
        if locked or not isinstance(error, OSError) or isinstance(error, BlockingIOError):
            raise
        return None
