"""Files inside a folder, reached without following a link.

A folder may come from somebody else: cloned, unpacked, shared. A link in it leads out of it, and what is read, moved
or removed through the link is another file than the one named. Every name here is relative to a folder, which the
caller trusts and which may itself be reached through links; nothing below it may.

POSIX opens each folder on the way by the handle of the one above. Windows has no such calls: there each folder on the
way is looked at before the path is used.
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

from nbpeft.errors import CheckpointError, CorruptCheckpointError

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_HANDLES = os.open in os.supports_dir_fd and os.listdir in os.supports_fd
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_FILE = _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_SHOWN = 160
_WINDOWS_LINKS = (0xA000000C, 0xA0000003)
"""Reparse tags of symbolic links and of junctions."""
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
    """The folder that a path is in, as a handle, and the path from there: the last part of the name.

    Raises:
        CheckpointError: the name leads out of ``root``, or a folder on the way is a link.
        OSError: a folder on the way is not there.
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
    """A path for a message: in one line, and shortened in the middle when it is very long."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
    text = text if text.isprintable() else repr(text)[1:-1]
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]}…{text[-half:]}"


# Looking


def status(root: Path, name: str) -> os.stat_result | None:
    """What is known about a file, a folder or a link itself; None where there is none, or a link is on the way."""
    try:
        with _parent(root, name) as (parent, leaf):
            return os.stat(leaf, dir_fd=parent, follow_symlinks=False)
    except (OSError, ValueError):
        return None


def is_folder(root: Path, name: str) -> bool:
    """Whether it is a folder, and no link to one."""
    found = status(root, name)
    return found is not None and stat.S_ISDIR(found.st_mode) and not _is_link(found)


def is_file(root: Path, name: str) -> bool:
    """Whether it is a plain file: no link to one, no pipe, no device."""
    found = status(root, name)
    return found is not None and stat.S_ISREG(found.st_mode) and not _is_link(found)


def names(root: Path, name: str) -> list[str]:
    """What is in a folder inside ``root``, in order; nothing where that is no folder."""
    if not is_folder(root, name):
        return []
    try:
        with _parent(root, f"{name}/x") as (parent, leaf):
            return sorted(os.listdir(os.path.dirname(leaf) if parent is None else parent))
    except (OSError, CheckpointError):
        return []


def kind_of(found: os.stat_result) -> str:
    """What something is that is no plain file, for a person."""
    return "a link" if _is_link(found) else _KINDS.get(stat.S_IFMT(found.st_mode), "no plain file")


def first_not_plain(root: Path) -> str | None:
    """What in a folder is neither a plain file nor a folder of such, for a person; None where all of it is."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            found = os.lstat(os.path.join(folder, name))
            if _is_link(found) or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                return f"{os.path.relpath(os.path.join(folder, name), root)} is {kind_of(found)}"
    return None


def check_stays(root: Path, name: str) -> None:
    """Checks a folder that another library writes to, which follows links: neither it nor what is in it leads out.

    Args:
        root: the folder that nothing may lead out of.
        name: inside it; need not be there.

    Raises:
        CheckpointError: a link leads out of ``root``.
        OSError: the folder cannot be read.
    """
    place, home = root / name, os.path.realpath(root)
    for path in (place, *(sorted(place.iterdir()) if place.is_dir() else ())):
        if not Path(os.path.realpath(path)).is_relative_to(home):
            leads = f"{shown(path)} is a link that leads out of {shown(root)}"
            raise CheckpointError(f"{leads}, and nothing is written through it: remove it", path=str(path))


# Reading and writing


def open_plain(root: Path, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Opens a plain file: never a link, and never one whose opening or reading could wait or have no end.

    Args:
        root: the folder.
        name: inside it.
        flags: as for ``os.open``. A file that is written must have no second name elsewhere.
        mode: permissions of a new file.

    Raises:
        CheckpointError: it is something else, or a link is on the way.
        OSError: it cannot be opened.
    """
    path, writes = root / name, bool(flags & (os.O_WRONLY | os.O_RDWR))
    with _parent(root, name) as (parent, leaf):
        with contextlib.suppress(FileNotFoundError):  # before it is opened: that alone may do something to a device
            _check_file(path, os.stat(leaf, dir_fd=parent, follow_symlinks=False), alone=writes)
        handle = os.open(leaf, flags | _FILE, mode, dir_fd=parent)
    try:
        _check_file(path, os.fstat(handle), alone=writes)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_file(path: Path, found: os.stat_result, *, alone: bool) -> None:
    if _is_link(found) or not stat.S_ISREG(found.st_mode):
        raise CorruptCheckpointError(f"{shown(path)} is {kind_of(found)}, not a plain file", path=str(path))
    if alone and found.st_nlink > 1:
        raise CorruptCheckpointError(f"{shown(path)} has a second name elsewhere, and is not written", path=str(path))


def open_file(path: Path) -> int:
    """Opens a plain file that is named by a caller, or a link to one, as those of the hub's cache are.

    Raises:
        CheckpointError: it is something whose reading could wait or have no end.
        OSError: it cannot be opened.
    """
    _check_file(path, os.stat(path), alone=False)
    handle = os.open(path, os.O_RDONLY | _FILE & ~_NO_LINK)
    try:
        _check_file(path, os.fstat(handle), alone=False)
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_file(path: Path, most: int) -> bytes:
    """The content of a plain file that is named by a caller, or of a link to one.

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
    """The content of a plain file.

    Raises:
        CheckpointError: it has more than ``most`` bytes, or is not a plain file.
        OSError: it cannot be read.
    """
    with open(open_plain(root, name), "rb") as file:
        return _content(file, root / name, most)


# Changing


def move(root: Path, name: str, target: Path, new: str) -> None:
    """Moves a file or a folder, over what is there; a link is moved itself.

    Raises:
        CheckpointError: a folder on one of the two ways is a link.
        OSError: it cannot be moved.
    """
    with _parent(root, name) as (source, leaf), _parent(target, new) as (there, new_leaf):
        os.replace(leaf, new_leaf, src_dir_fd=source, dst_dir_fd=there)


def second_name(root: Path, name: str, new: str) -> None:
    """Gives a file a second name in the same folder or below it, or copies it where the file system has no links.

    Raises:
        CheckpointError: a folder on one of the two ways is a link.
        OSError: it cannot be done.
    """
    with _parent(root, name) as (source, leaf), _parent(root, new) as (there, new_leaf):
        try:
            os.link(leaf, new_leaf, src_dir_fd=source, dst_dir_fd=there, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copy2(root / name, root / new, follow_symlinks=False)


def remove(root: Path, name: str) -> None:
    """Removes a file or a link, if it is there.

    Raises:
        CheckpointError: a folder on the way is a link.
        OSError: it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError), _parent(root, name) as (parent, leaf):
        os.unlink(leaf, dir_fd=parent)


def make_folders(root: Path, name: str) -> list[Path]:
    """Makes a folder inside ``root`` with those above it; returns those that were not there, outermost first.

    Raises:
        CheckpointError: one on the way is a link.
        OSError: one cannot be made, or is a file.
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
