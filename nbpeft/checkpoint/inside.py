"""Access to files inside a folder without following symbolic links.

A folder may be untrusted: cloned, unpacked or shared. A link in it can point outside, so that reading, moving or
removing the named file would affect another one. Every name here is relative to a root folder. The caller trusts the
root, and the root's own path may contain links; nothing below it may.

On POSIX each folder of the path is opened relative to the descriptor of its parent, so that it cannot be exchanged for
a link between the check and the use. Windows has no such calls: there each folder is checked before the path is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

from nbpeft.errors import CheckpointError, CorruptCheckpointError, PathTypeError

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_HANDLES = os.open in os.supports_dir_fd and os.listdir in os.supports_fd
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_FILE = _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_SHOWN = 160
_WINDOWS_LINKS = (0xA000000C, 0xA0000003)
"""Reparse tags of symbolic links and of junctions on Windows."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def _parent(root: Path, name: str) -> Iterator[tuple[int | None, str]]:
    """Opens the parent folder of a path; yields its descriptor and the last part of the name.

    Without support for descriptors (Windows), yields None and the whole path.

    Raises:
        CheckpointError: the name leads out of ``root``, or a folder of the path is a link.
        OSError: a folder of the path does not exist.
    """
    *folders, leaf = _parts(root, name)
    if not _HANDLES:
        place = root
        for folder in folders:
            place = place / folder
            _check_folder(place, os.lstat(place))
        yield None, str(place / leaf)
        return
    handle = os.open(root, _FOLDER)
    try:
        place = root
        for folder in folders:
            place = place / folder
            inner = _opened_folder(place, folder, handle)
            os.close(handle)
            handle = inner
        yield handle, leaf
    finally:
        os.close(handle)


def _opened_folder(place: Path, name: str, parent: int) -> int:
    try:
        return os.open(name, _FOLDER | _NO_LINK, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            _check_folder(place, os.stat(name, dir_fd=parent, follow_symlinks=False))
        raise


def _parts(root: Path, name: str) -> tuple[str, ...]:
    parts = PurePath(name).parts
    if not parts or ".." in parts or PurePath(name).anchor:
        raise CheckpointError(f"{shown(name) or 'an empty name'} is not the name of a file inside {shown(root)}")
    return parts


def _check_folder(place: Path, found: os.stat_result) -> None:
    if _is_link(found):
        raise CheckpointError(f"{shown(place)} is a link, and links inside a folder are not followed", path=str(place))
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))


def _is_link(found: os.stat_result) -> bool:
    return stat.S_ISLNK(found.st_mode) or getattr(found, "st_reparse_tag", 0) in _WINDOWS_LINKS


def shown(path: str | os.PathLike[str]) -> str:
    """Returns a path for a message: on one line, with the middle of a very long path left out."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
    text = text if text.isprintable() else repr(text)[1:-1]
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]}…{text[-half:]}"


def expanded(path: object) -> str:
    """Returns a path or hub id as a text, with ``~`` expanded.

    Args:
        path: a text or a path.

    Raises:
        PathTypeError: it is anything else.
    """
    if not isinstance(path, str | os.PathLike):
        raise PathTypeError(f"expected a folder or hub id, a text or a path, not {path!r:.60}")
    return os.path.expanduser(os.fspath(path))


# Inspecting


def status(root: Path, name: str) -> os.stat_result | None:
    """Returns the ``lstat`` result of a path.

    Args:
        root: the trusted folder.
        name: path relative to it.

    Returns:
        The status of the file, folder or link itself; None if it does not exist or a folder of the path is a link.

    Raises:
        OSError: it cannot be determined; what is not seen must not be taken for absent, and be replaced or removed.
    """
    found = None
    with _if_there(), _parent(root, name) as (parent, leaf):
        found = os.stat(leaf, dir_fd=parent, follow_symlinks=False)
    return found


@contextmanager
def _if_there() -> Iterator[None]:
    """A block that is left where something that it looks at does not exist; other errors are raised."""
    try:
        yield
    except ValueError:
        return
    except OSError as error:
        if error.errno not in _ABSENT:
            raise


def is_folder(root: Path, name: str) -> bool:
    """Returns whether a path inside ``root`` is a folder and not a link to one.

    Raises:
        OSError: it cannot be determined.
    """
    found = status(root, name)
    return found is not None and stat.S_ISDIR(found.st_mode) and not _is_link(found)


def leads_to_folder(path: Path) -> bool:
    """Returns whether a path is a folder or a link to one.

    Raises:
        CheckpointError: it cannot be determined, which ``os.path.isdir`` takes for no.
    """
    return stat.S_ISDIR(_mode(path))


def leads_to_file(path: Path) -> bool:
    """Returns whether a path is a regular file or a link to one.

    Raises:
        CheckpointError: it cannot be determined, which ``Path.is_file`` takes for no since Python 3.14.
    """
    return stat.S_ISREG(_mode(path))


def is_there(path: Path) -> bool:
    """Returns whether a path is anything, a link that leads nowhere included.

    Raises:
        CheckpointError: it cannot be determined, which ``os.path.lexists`` takes for no.
    """
    return _mode(path, follow_symlinks=False) != 0


def _mode(path: Path, *, follow_symlinks: bool = True) -> int:
    """The mode of the file or folder that a path leads to, or 0 if there is none."""
    mode = 0
    try:
        with _if_there():
            mode = os.stat(path, follow_symlinks=follow_symlinks).st_mode
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}", path=str(path)) from error
    return mode


def is_file(root: Path, name: str) -> bool:
    """Returns whether a path inside ``root`` is a regular file: not a link, pipe or device.

    Raises:
        OSError: it cannot be determined.
    """
    found = status(root, name)
    return found is not None and stat.S_ISREG(found.st_mode) and not _is_link(found)


def names(root: Path, name: str) -> list[str]:
    """Returns the sorted names in a folder inside ``root``; empty if it is not a folder.

    Raises:
        OSError: they cannot be read.
    """
    if not is_folder(root, name):
        return []
    with contextlib.suppress(CheckpointError), _parent(root, f"{name}/x") as (parent, leaf):
        return sorted(os.listdir(os.path.dirname(leaf) if parent is None else parent))
    return []


def kind_of(found: os.stat_result) -> str:
    """Describes a path that is not a regular file, e.g. ``a link`` or ``a named pipe``."""
    return "a link" if _is_link(found) else _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")


def first_not_plain(root: Path) -> str | None:
    """Describes the first path in a folder that is neither a regular file nor a folder; None if there is none."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            found = os.lstat(os.path.join(folder, name))
            if _is_link(found) or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                return f"{os.path.relpath(os.path.join(folder, name), root)} is {kind_of(found)}"
    return None


def check_stays(root: Path, name: str) -> None:
    """Checks that a library which follows links can write to a folder without leaving ``root``.

    Args:
        root: the trusted folder.
        name: path of the folder relative to it; need not exist.

    Raises:
        CheckpointError: the folder or one of its entries is a link that leads out of ``root``.
        OSError: the folder cannot be read.
    """
    place, home = root / name, os.path.realpath(root)
    for path in (place, *(sorted(place.iterdir()) if place.is_dir() else ())):
        if not Path(os.path.realpath(path)).is_relative_to(home):
            leads = f"{shown(path)} is a link that leads out of {shown(root)}"
            raise CheckpointError(f"{leads}, and nothing is written through it: remove it", path=str(path))


# Reading and writing


def open_plain(root: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file; refuses links, pipes and devices, which could block or never end.

    Args:
        root: the trusted folder.
        name: path relative to it.
        flags: as for ``os.open``. A file that is opened for writing must not have further hard links.

    Returns:
        The file descriptor.

    Raises:
        CheckpointError: it is not a regular file, or a folder of the path is a link.
        OSError: it cannot be opened.
    """
    path, writes = root / name, bool(flags & (os.O_WRONLY | os.O_RDWR))
    with _parent(root, name) as (parent, leaf):
        with contextlib.suppress(FileNotFoundError):  # checked before too: opening a device can have effects
            _check_file(path, os.stat(leaf, dir_fd=parent, follow_symlinks=False), alone=writes)
        handle = os.open(leaf, flags | _FILE, 0o666, dir_fd=parent)
    return _checked(handle, path, alone=writes)


def _check_file(path: Path, found: os.stat_result, *, alone: bool) -> None:
    if _is_link(found) or not stat.S_ISREG(found.st_mode):
        raise CorruptCheckpointError(f"{shown(path)} is {kind_of(found)}, not a plain file", path=str(path))
    if alone and found.st_nlink > 1:
        raise CorruptCheckpointError(f"{shown(path)} has a second hard link, and is not written", path=str(path))


def _checked(handle: int, path: Path, *, alone: bool) -> int:
    """Returns the descriptor of an open file; closes it and raises an error if it is not a plain file."""
    try:
        _check_file(path, os.fstat(handle), alone=alone)
    except BaseException:
        os.close(handle)
        raise
    return handle


def open_file(path: Path) -> int:
    """Opens a regular file that the caller trusts, or a link to one: the hub's cache consists of links.

    Returns:
        The file descriptor.

    Raises:
        CheckpointError: it is a pipe, a device or another kind of file whose reading could block or never end.
        OSError: it cannot be opened.
    """
    _check_file(path, os.stat(path), alone=False)
    return _checked(os.open(path, os.O_RDONLY | _FILE & ~_NO_LINK), path, alone=False)


def read_file(path: Path, most: int) -> bytes:
    """Reads a regular file that the caller trusts, or a link to one.

    Args:
        path: the file.
        most: largest accepted size in bytes.

    Raises:
        CheckpointError: it has more than ``most`` bytes, or is not a plain file.
        OSError: it cannot be read.
    """
    with open(open_file(path), "rb") as file:
        return _content(file, path, most)


def _content(file: BinaryIO, path: Path, most: int) -> bytes:
    content = file.read(most + 1)
    if len(content) > most:
        raise CorruptCheckpointError(f"{shown(path)} has more than {most:,} bytes", path=str(path))
    return content


def read_plain(root: Path, name: str, most: int) -> bytes:
    """Reads a regular file inside ``root``.

    Args:
        root: the trusted folder.
        name: path relative to it.
        most: largest accepted size in bytes.

    Raises:
        CheckpointError: it has more than ``most`` bytes, or is not a plain file.
        OSError: it cannot be read.
    """
    with open(open_plain(root, name), "rb") as file:
        return _content(file, root / name, most)


# Changing


def move(root: Path, name: str, target: Path, new: str) -> None:
    """Renames a file or a folder and replaces the target; a link itself is renamed, not the file it points to.

    Args:
        root: trusted folder of the source.
        name: path of the source relative to it.
        target: trusted folder of the target.
        new: path of the target relative to it.

    Raises:
        CheckpointError: a folder of one of the two paths is a link.
        OSError: it cannot be renamed.
    """
    with _parent(root, name) as (source, leaf), _parent(target, new) as (there, new_leaf):
        os.replace(leaf, new_leaf, src_dir_fd=source, dst_dir_fd=there)


def second_name(root: Path, name: str, new: str) -> None:
    """Creates a hard link to a file, or a copy if the file system has no hard links.

    Args:
        root: the trusted folder.
        name: path of the file relative to it.
        new: path of the link relative to it.

    Raises:
        CheckpointError: a folder of one of the two paths is a link.
        OSError: neither is possible.
    """
    with _parent(root, name) as (source, leaf), _parent(root, new) as (there, new_leaf):
        try:
            os.link(leaf, new_leaf, src_dir_fd=source, dst_dir_fd=there, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copyfile(root / name, root / new, follow_symlinks=False)
            with contextlib.suppress(OSError):  # mounted drives may not have permissions
                shutil.copystat(root / name, root / new, follow_symlinks=False)


def remove(root: Path, name: str) -> None:
    """Removes a file or a link, if it exists.

    Args:
        root: the trusted folder.
        name: path relative to it.

    Raises:
        CheckpointError: a folder of the path is a link.
        OSError: it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError), _parent(root, name) as (parent, leaf):
        os.unlink(leaf, dir_fd=parent)


def make_folders(root: Path, name: str) -> list[Path]:
    """Creates a folder inside ``root`` with its parents.

    Args:
        root: the trusted folder.
        name: path relative to it.

    Returns:
        The folders that were created, outermost first.

    Raises:
        CheckpointError: a folder of the path is a link.
        OSError: a folder cannot be created, or is a file.
    """
    made: list[Path] = []
    parts = () if name in ("", ".") else _parts(root, name)
    try:
        for number in range(1, len(parts) + 1):
            path = "/".join(parts[:number])
            with _parent(root, path) as (parent, leaf), contextlib.suppress(FileExistsError):
                os.mkdir(leaf, dir_fd=parent)
                made.append(root / path)
            found = status(root, path)
            if found is not None:
                _check_folder(root / path, found)
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return made
