"""All runs of one place: their names, and what becomes of old ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbpeft.checkpoint.atomic import disk_errors, shown
from nbpeft.checkpoint.staging import Staging, sweep
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, did_you_mean
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.record import CRASHED, RunRecord

MOST_RUNS = 200
MOST_BYTES = 4_000_000_000
"""Of all runs of a place; beyond it the oldest ended ones lose their states, and keep their curves."""
_NAME = re.compile(r"\w[\w.+-]{0,99}")


@dataclass(frozen=True)
class RunStore:
    """The runs of one place.

    Attributes:
        place: a folder, made with the first run.
    """

    place: Path

    def records(self) -> list[RunRecord]:
        """The runs, the newest first; folders that are none are passed over."""
        found = [record for folder in self._folders() if (record := folder.record()) is not None]
        return sorted(found, key=lambda record: (-record.started, record.name))

    def create(self, adapter: str) -> RunFolder:
        """A new run called ``ADAPTER-N``, taken for this process.

        Raises:
            CheckpointError: the place cannot be written.
        """
        stem = re.sub(r"[^\w.+-]+", "+", adapter).strip("+.-")[:80] or "run"
        with disk_errors(self.place):
            self._make_place()
            taken = [
                match[1]
                for name in os.listdir(self.place)
                if (match := re.fullmatch(rf"{re.escape(stem)}-(\d{{1,9}})", name))
            ]
            for number in itertools.count(max(map(int, taken), default=0) + 1):
                folder = RunFolder(self.place / f"{stem}-{number}")
                try:
                    os.mkdir(folder.path, 0o700)  # the name belongs to whoever makes the folder
                except FileExistsError:
                    continue
                folder.open()
                return folder
        raise AssertionError("unreachable")

    def find(self, name: str) -> RunFolder:
        """The run of that name.

        Raises:
            CheckpointNotFoundError: there is none; the message names near ones.
        """
        names = [folder.name for folder in self._folders()]
        if name not in names:
            hint = did_you_mean(str(name), names) or (f" There is: {', '.join(sorted(names)[:8])}." if names else "")
            raise CheckpointNotFoundError(f"no run is called {name!r:.60} in {shown(self.place)}.{hint}", name=name)
        return RunFolder(self.place / name)

    def rename(self, name: str, new: str) -> None:
        """Gives a run another name.

        Raises:
            CheckpointError: the name is taken or impossible, or the run is still running.
        """
        folder = self.find(name)
        if not _NAME.fullmatch(new):
            raise CheckpointError(f"{new!r:.60} cannot be the name of a run: letters, digits, and _ . + - inside")
        if os.path.lexists(self.place / new):
            raise CheckpointError(f"there is a run {new!r} already")
        with disk_errors(self.place), _taken(folder):
            os.rename(folder.path, self.place / new)

    def delete(self, name: str) -> None:
        """Removes a run with all that is kept of it.

        Raises:
            CheckpointError: there is none of exactly that name, or it is still running.
        """
        folder = self.find(name)
        with disk_errors(self.place), _taken(folder):
            self._remove(folder.path)

    def tidy(self, *, most_runs: int = MOST_RUNS, most_bytes: int = MOST_BYTES) -> None:
        """Removes the oldest ended runs beyond a number, and the states of old ones beyond a size.

        The newest run stays whole. Runs that could go on go after those that ended by themselves.
        """
        records = self.records()
        ended = [record for record in records[1:] if record.status != "running"]
        oldest = sorted(ended, key=lambda record: (record.status == CRASHED, record.started))
        with contextlib.suppress(OSError, CheckpointError):  # what cannot be removed now goes another time
            surplus = oldest[: max(len(records) - most_runs, 0)]
            for record in surplus:
                self.delete(record.name)
            sizes = {
                record.name: RunFolder(Path(record.path)).byte_count() for record in records if record not in surplus
            }
            for record in oldest[len(surplus) :]:
                if sum(sizes.values()) <= most_bytes:
                    return
                folder = RunFolder(Path(record.path))
                with _taken(folder):
                    for step in record.kept_steps:
                        self._remove(folder.path / f"checkpoint-{step}")
                sizes[record.name] = folder.byte_count()

    def _folders(self) -> Iterator[RunFolder]:
        try:
            names = sorted(name for name in os.listdir(self.place) if not name.startswith("."))
        except OSError:
            return
        for name in names:
            if (self.place / name / "run.json").is_file():
                yield RunFolder(self.place / name)

    def _make_place(self) -> None:
        if not self.place.is_dir():
            self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), open(self.place / ".gitignore", "x", encoding="utf-8") as file:
                file.write("*\n")

    def _remove(self, path: Path) -> None:
        """Out of its place in one move, so that no part of it is left there."""
        sweep(self.place)
        staging = Staging(self.place)
        try:
            os.replace(path, staging.path / path.name)
        finally:
            staging.close()


@dataclass(frozen=True)
class RunPlace:
    """Where a training is to be kept.

    Attributes:
        store: the runs of the place.
        name: of a run that goes on; None for a new one.
        model: variable that holds the model.
        source: text that the training was started with, to start it again.
        arguments: those that the run keeps, where another process than the one that was given them trains.
    """

    store: RunStore
    name: str | None = None
    model: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: RunPlace | str | os.PathLike[str]) -> RunPlace:
        """A folder, or what says more about one."""
        return given if isinstance(given, RunPlace) else cls(RunStore(Path(os.path.expanduser(os.fspath(given)))))


@contextlib.contextmanager
def _taken(folder: RunFolder) -> Iterator[None]:
    """Holds a run while it is moved or removed."""
    folder.open()
    try:
        yield
    finally:
        folder.close()
