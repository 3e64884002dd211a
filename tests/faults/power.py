"""What a disk may hold after a loss of power, at each moment of a write.

``recorded`` notes in which order a block changes the folders below a root (each call that creates, renames, links or
removes a name), what it writes into files, and what it flushes. From that, ``Recording.states`` draws the states that
POSIX allows after a crash, as ALICE does (Pillai et al., OSDI 2014):

- a change of names is on the disk for certain once a folder that it touches was flushed after it. Others may be there
  or not, in any order; but a change depends on earlier ones of the same name, on the creation of the folders that it
  touches, and, if it removes a folder, on the removals inside it;
- a change of names is there completely or not at all; a folder whose own name was never flushed may be gone;
- of a file that was not flushed after it was written there may be the old content, none, a part, zeros, or all.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CALLS = ("mkdir", "replace", "rename", "link", "unlink", "remove", "rmdir", "fsync", "fdatasync")
ROOT = 0
Name = tuple[int, str]
"""The number of a folder, and a name in it."""


@dataclass(frozen=True)
class Content:
    """The content of a file, and when it was written, in ns."""

    data: bytes
    time: int


@dataclass(frozen=True)
class Change:
    """Names that one call changes together.

    Attributes:
        names: name -> number of the file or folder that it has now; None if it is gone.
        made: numbers of the folders that it creates.
        gone: numbers of the folders that it removes.
    """

    names: Mapping[Name, int | None]
    made: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()

    @property
    def folders(self) -> set[int]:
        return {folder for folder, _ in self.names}


State = Mapping[str, Content | None]
"""Path below the root -> content of the file, None for a folder; a folder precedes what is in it."""


@dataclass
class Recording:
    """Everything a block does to the disk, in order.

    Attributes:
        root: the folder that is watched.
        events: a change of names, (file, content) for something written, or the number of what is flushed.
    """

    root: Path
    events: list[Change | tuple[int, Content] | int] = field(default_factory=list)
    _names: dict[Name, int] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    _folders: set[int] = field(default_factory=lambda: {ROOT})
    _next: int = 1
    _begun: int = 0

    def begin(self) -> None:
        """Takes what is there for flushed."""
        self._numbers[os.stat(self.root).st_ino] = ROOT
        self.look()
        self.events += range(self._next)
        self._begun = len(self.events)

    @property
    def moments(self) -> range:
        """The numbers of events after which a crash may come."""
        return range(self._begun, len(self.events) + 1)

    def look(self, *, together: bool = False, again: int | None = None) -> None:
        """Notes what has changed since the last look.

        Args:
            together: whether it is the effect of one call.
            again: number of a file to read even if size and time are as before.
        """
        names: dict[Name, int] = {}
        written: list[tuple[int, Content]] = []
        self._walk(str(self.root), ROOT, names, written, again)
        keys = [key for key in {**self._names, **names} if self._names.get(key) != names.get(key)]
        if keys:
            before, now = frozenset(self._names.values()), frozenset(names.values())
            made, gone = (now - before) & self._folders, before - now
            changed = {key: names.get(key) for key in keys}
            if together:
                self.events.append(Change(changed, made, gone & self._folders))
            else:
                self.events += [Change({key: value}, made & {value or ROOT}) for key, value in changed.items()]
            self._numbers = {inode: number for inode, number in self._numbers.items() if number not in gone}
            self._names = names
        self.events += written

    def _walk(
        self, path: str, folder: int, names: dict[Name, int], written: list[tuple[int, Content]], again: int | None
    ) -> None:
        for name in sorted(os.listdir(path)):
            place = os.path.join(path, name)
            found = os.lstat(place)
            number = self._numbers.get(found.st_ino)
            if number is None:
                number = self._numbers[found.st_ino] = self._next
                self._next += 1
                if stat.S_ISDIR(found.st_mode):
                    self._folders.add(number)
            names[folder, name] = number
            if number in self._folders:
                self._walk(place, number, names, written, again)
            elif self._seen.get(number) != (mark := (found.st_size, found.st_mtime_ns)) or number == again:
                self._seen[number] = mark
                content = Content(Path(place).read_bytes(), found.st_mtime_ns)
                if content not in (value for file, value in written if file == number):
                    written.append((number, content))

    def flush(self, handle: int) -> None:
        """Notes that a file or folder is flushed."""
        number = self._numbers.get(os.fstat(handle).st_ino)
        if number is not None:
            if number not in self._folders:
                self.look(again=number)
            self.events.append(number)

    # What may be left

    def states(self, moment: int, draw: random.Random, *, orders: int, tears: int) -> Iterator[State]:
        """Gives the states after a crash at a moment: each change alone, all but each, and some drawn ones.

        Args:
            moment: how many events were before it.
            draw: draws parts of files, and orders.
            orders: how many orders are drawn.
            tears: how many times parts of files are drawn for each.
        """
        changes = {place: event for place, event in enumerate(self.events[:moment]) if isinstance(event, Change)}
        flushed = {event: place for place, event in enumerate(self.events[:moment]) if isinstance(event, int)}
        written: dict[int, list[tuple[int, Content]]] = {}
        for place, event in enumerate(self.events[:moment]):
            if isinstance(event, tuple):
                written.setdefault(event[0], []).append((place, event[1]))
        certain = {
            place
            for place, change in changes.items()
            if any(flushed.get(folder, -1) > place for folder in change.folders)
        }
        for chosen in dict.fromkeys(_choices(changes, certain, draw, orders)):
            names: dict[Name, int] = {}
            for place, change in changes.items():
                if place in certain or place in chosen:
                    for key, number in change.names.items():
                        names.pop(key, None)
                        names.update({key: number} if number is not None else {})
            for how in ("new", "old", *["drawn"] * tears):
                left = {file: _left(versions, flushed.get(file, -1), draw, how) for file, versions in written.items()}
                yield dict(self._laid_out(names, left, ROOT, ""))

    def _laid_out(
        self, names: Mapping[Name, int], contents: Mapping[int, Content], folder: int, path: str
    ) -> Iterator[tuple[str, Content | None]]:
        for (parent, name), number in sorted(names.items()):
            if parent == folder:
                place = f"{path}/{name}" if path else name
                if number in self._folders:
                    yield place, None
                    yield from self._laid_out(names, contents, number, place)
                else:
                    yield place, contents.get(number, Content(b"", 0))


def _choices(
    changes: Mapping[int, Change], certain: set[int], draw: random.Random, orders: int
) -> Iterator[frozenset[int]]:
    """Gives sets of the changes that are not certain, each with all that it needs."""
    pending = [place for place in changes if place not in certain]
    needs = {place: _needs(place, changes, pending) for place in pending}
    yield frozenset()
    yield frozenset(pending)
    for one in pending:
        yield frozenset({one, *needs[one]})
        yield frozenset(place for place in pending if place != one and one not in needs[place])
    for _ in range(orders if len(pending) > 2 else 0):
        drawn = {place for place in pending if draw.random() < 0.5}
        yield frozenset(place for place in drawn if needs[place] <= drawn)


def _needs(place: int, changes: Mapping[int, Change], pending: list[int]) -> set[int]:
    """The earlier pending changes without which one cannot be on the disk."""
    needed: set[int] = set()
    for earlier in reversed([other for other in pending if other < place]):
        before = changes[earlier]
        for later in (changes[place], *(changes[other] for other in needed)):
            if before.names.keys() & later.names.keys() or before.made & later.folders or before.folders & later.gone:
                needed.add(earlier)
                break
    return needed


def _left(versions: list[tuple[int, Content]], flushed: int, draw: random.Random, how: str) -> Content:
    """What there may be of a file."""
    old = next((content for place, content in reversed(versions) if place < flushed), Content(b"", 0))
    later = [content for place, content in versions if place > flushed]
    if not later or how == "old":
        return old
    if how == "new":
        return later[-1]
    new = draw.choice(later)
    cut = draw.randrange(len(new.data) + 1)
    begun = new.data[:cut]
    rests = (b"", old.data[cut:], bytes(len(new.data) - cut))
    return Content(draw.choice((b"", old.data, *(begun + rest for rest in rests))), new.time)


@contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """Notes what the block does below a folder, of which everything counts as flushed before. Nothing is flushed."""
    recording = Recording(root)
    recording.begin()

    def noting(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            recording.look()
            if name in ("fsync", "fdatasync"):
                recording.flush(getattr(args[0], "fileno", lambda: args[0])())
                return None
            try:
                return original(*args, **kwargs)
            finally:
                recording.look(together=True)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, noting(name, getattr(os, name)))
        yield recording
    recording.look()


def lay_out(state: State, root: Path) -> None:
    """Writes a state below a new folder."""
    root.mkdir()
    for name, content in state.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content.data)
            os.utime(root / name, ns=(content.time, content.time))
