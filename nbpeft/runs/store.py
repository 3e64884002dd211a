"""All runs of one folder: creates, finds, renames and deletes them, and cleans up old ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbpeft.checkpoint.atomic import disk_errors
from nbpeft.checkpoint.inside import is_there, shown
from nbpeft.checkpoint.source import CONFIG_NAME
from nbpeft.checkpoint.staging import discard, flush_folder, make_folder, sweep
from nbpeft.checkpoint.tensor_file import weights_mark
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, did_you_mean, few
from nbpeft.runs.folder import FACTS, RunFolder
from nbpeft.runs.record import CRASHED, LONGEST_NOTE, UNREADABLE, RunRecord, one_line

MOST_RUNS = 200
"""Number of runs in a folder beyond which the oldest ended ones are deleted."""
MOST_BYTES = 4_000_000_000
"""Total size in bytes beyond which checkpoints of the oldest ended runs are deleted, but not their curves."""
_NAME = re.compile(r"\w[\w.+-]{0,99}")


@dataclass(frozen=True)
class RunStore:
    """The runs of one folder.

    Attributes:
        place: the folder; created with the first run.
    """

    place: Path

    def records(self, unseen: dict[str, OSError] | None = None) -> list[RunRecord]:
        """Returns the runs, the newest first and unreadable ones last; folders that are not runs are skipped.

        Args:
            unseen: takes, by name, the error of each folder of which cannot be said whether it is a run; without it,
                these are skipped.

        Raises:
            CheckpointError: the folder of the runs cannot be read.
        """
        found = [folder.record() for folder in self._folders(unseen)]
        return sorted(found, key=lambda record: (-record.started, record.name))

    def create(self, adapter: str) -> RunFolder:
        """Creates a run called ``ADAPTER-N`` and locks it for this process.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        stem = re.sub(r"[^\w.+-]+", "+", adapter).strip("+.-")[:80] or "run"
        with disk_errors(self.place):
            self._make_place()
            used_numbers = [
                match[1]
                for name in os.listdir(self.place)
                if (match := re.fullmatch(rf"{re.escape(stem)}-(\d{{1,9}})", name))
            ]
            for number in itertools.count(max(map(int, used_numbers), default=0) + 1):
                folder = RunFolder(self.place / f"{stem}-{number}")
                try:
                    os.mkdir(folder.path, 0o700)  # atomic: another process may try the same name
                except FileExistsError:
                    continue
                flush_folder(self.place)
                folder.open()
                return folder
        raise AssertionError("unreachable")

    def find(self, name: str) -> RunFolder:
        """Returns the run of a name.

        Raises:
            CheckpointNotFoundError: there is none; the message suggests similar names.
            CheckpointError: the folder of the runs, or that of this one, cannot be read.
        """
        unseen: dict[str, OSError] = {}
        names = {folder.name: folder for folder in self._folders(unseen)}
        if name in unseen:
            raise CheckpointError(f"run {name!r} cannot be read: {unseen[name].strerror}")
        if name not in names:
            hint = did_you_mean(str(name), names) or (f" Runs: {', '.join(sorted(names)[:8])}." if names else "")
            raise CheckpointNotFoundError(f"no run is called {name!r:.60} in {shown(self.place)}.{hint}", name=name)
        return names[name]

    def with_id(self, run_id: str) -> RunFolder | None:
        """Returns the run of an id, whatever its name is now; None if there is none, or it cannot be read."""
        with contextlib.suppress(CheckpointError):
            return next((folder for folder in self._folders() if run_id and _id_of(folder) == run_id), None)
        return None

    def rename(self, name: str, new: str, run_id: str | None = None) -> None:
        """Renames a run.

        Args:
            name: current name of the run.
            new: its new name.
            run_id: the run's id, if another run of its name must not be renamed.

        Raises:
            CheckpointNotFoundError: there is no such run.
            CheckpointError: the new name is taken or invalid, or the run is still running or another one.
        """
        folder = self.find(name)
        if not _NAME.fullmatch(new):
            raise CheckpointError(
                f"{new!r:.60} cannot be the name of a run: use letters, digits, and inside the name _ . + -"
            )
        if is_there(self.place / new):
            raise CheckpointError(f"a run called {new!r} already exists")
        with disk_errors(self.place), _locked(folder, run_id):
            os.rename(folder.path, self.place / new)
            flush_folder(self.place)

    def note(self, name: str, text: str, run_id: str | None = None) -> None:
        """Writes a note on a run, in place of the one that it has; an empty text removes it.

        Args:
            name: name of the run.
            text: the note.
            run_id: see ``rename``.

        Raises:
            CheckpointNotFoundError: there is no such run.
            CheckpointError: the run is still running or another one, or cannot be read or written, or the text is too
                long.
        """
        folder = self.find(name)
        if len(text) > LONGEST_NOTE:
            raise CheckpointError(f"a note has at most {LONGEST_NOTE:,} characters, and this one {len(text):,}")
        with disk_errors(self.place), _locked(folder, run_id):
            folder.write({**folder.facts(), "note": one_line(text)})

    def delete(self, name: str, run_id: str | None = None) -> None:
        """Deletes a run with its checkpoints.

        Args:
            name: name of the run.
            run_id: see ``rename``.

        Raises:
            CheckpointError: there is no such run, or it is still running or another one.
        """
        folder = self.find(name)
        with disk_errors(self.place), _locked(folder, run_id):
            self._remove(folder.path.name)

    def mark_saved(self, run_id: str, adapter: str, folder: str | os.PathLike[str]) -> None:
        """Records where an adapter of an ended run was saved, so that its last checkpoint may be cleaned up.

        Args:
            run_id: id of the run; nothing is recorded if it was deleted.
            adapter: current name of the adapter. In a run that trained several, it must be the name it had then.
            folder: folder in which it was saved.
        """
        with contextlib.suppress(CheckpointError, OSError):  # saving must not fail because of this record
            run = self.with_id(run_id)
            if run is None:
                return
            with _locked(run):
                facts, record = run.facts(), run.record()
                known = record.adapters[0] if len(record.adapters) == 1 else adapter
                if known in record.adapters:
                    saved = {**record.saved, known: os.path.abspath(folder)}
                    files = {**record.saved_files, known: _weights_file(folder)}
                    run.write({**facts, "saved": saved, "saved_files": files})

    def tidy(self, *, most_runs: int = MOST_RUNS, most_bytes: int = MOST_BYTES) -> list[str]:
        """Deletes the oldest ended runs beyond a number, and checkpoints of old runs beyond a total size.

        The newest run is never touched, nor the last checkpoint of a run whose adapter was not saved elsewhere.
        Crashed runs, which could be resumed, are cleaned up after the others.

        Args:
            most_runs: number of runs to keep.
            most_bytes: total size of the runs in bytes.

        Returns:
            One line for each thing the user should know: what was deleted, and why more than ``most_bytes`` remain.
        """
        records = [record for record in self.records() if record.status != UNREADABLE]
        ended = [record for record in records[1:] if record.status != "running"]
        oldest = sorted(ended, key=lambda record: (record.status == CRASHED, record.started))
        surplus = [record for record in oldest if not _holds_the_only_copy(record)][: max(len(records) - most_runs, 0)]
        deleted = [record.name for record in surplus if self._removed(RunFolder(Path(record.path)), ["."])]
        sizes = {record.name: RunFolder(Path(record.path)).byte_count() for record in records if record not in surplus}
        emptied = []
        for record in (record for record in oldest if record not in surplus):
            unneeded = record.kept_steps[1:] if _holds_the_only_copy(record) else record.kept_steps
            if unneeded and sum(sizes.values()) > most_bytes:
                folder = RunFolder(Path(record.path))
                emptied += [record.name] * self._removed(folder, [f"checkpoint-{step}" for step in unneeded])
                sizes[record.name] = folder.byte_count()
        return _tidied(deleted, emptied, sum(sizes.values()), most_runs, most_bytes)

    def _removed(self, folder: RunFolder, parts: Iterable[str]) -> bool:
        """Removes parts of a run (``.`` is the whole run) if possible; returns whether that succeeded."""
        try:
            with _locked(folder):
                for part in parts:
                    self._remove(os.path.normpath(os.path.join(folder.path.name, part)))
        except (CheckpointError, OSError):
            return False
        return True

    def _folders(self, unseen: dict[str, OSError] | None = None) -> Iterator[RunFolder]:
        """Yields the runs.

        Args:
            unseen: receives the errors of folders that may or may not be runs, by name.

        Raises:
            CheckpointError: the folder of the runs cannot be read; one that does not exist has no runs.
        """
        try:
            names = sorted(name for name in os.listdir(self.place) if not name.startswith("."))
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"the runs folder {shown(self.place)} cannot be read: {error.strerror}") from None
        for name in names:
            try:
                os.lstat(self.place / name / FACTS)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if unseen is not None:
                    unseen[name] = error
                continue
            yield RunFolder(self.place / name)

    def _make_place(self) -> None:
        if not self.place.is_dir():
            make_folder(self.place.parent, [])
            self.place.mkdir(mode=0o700, exist_ok=True)
            flush_folder(self.place.parent)
            with contextlib.suppress(FileExistsError), open(self.place / ".gitignore", "x", encoding="utf-8") as file:
                file.write("*\n")

    def _remove(self, name: str) -> None:
        sweep(self.place)
        discard(self.place, [name])


def _id_of(folder: RunFolder) -> str:
    """Returns the id of a run; empty if it cannot be read."""
    try:
        return str(folder.facts().get("id") or "")
    except CheckpointError:
        return ""


def _holds_the_only_copy(record: RunRecord) -> bool:
    """Returns whether a run has the only copy of an adapter.

    That is a run with a checkpoint and an adapter that was not saved elsewhere, or whose saved file was replaced since.
    """
    return bool(record.kept_steps) and not all(_is_still_saved(record, adapter) for adapter in record.adapters)


def _is_still_saved(record: RunRecord, adapter: str) -> bool:
    place, file = record.saved.get(adapter), record.saved_files.get(adapter)
    if not place or not file:
        return False
    return os.path.isfile(os.path.join(place, CONFIG_NAME)) and _weights_file(place) == file


def _weights_file(folder: str | os.PathLike[str]) -> str:
    """Returns size and modification time of the weights file in a folder as text; empty if there is none."""
    return " ".join(map(str, weights_mark(folder) or ()))


def _tidied(
    deleted: Sequence[str], emptied: Sequence[str], byte_count: int, most_runs: int, most_bytes: int
) -> list[str]:
    """Returns the messages of ``RunStore.tidy``."""
    notes = []
    if deleted:
        notes.append(f"more than {most_runs} runs were kept: deleted {few(deleted, 3)}")
    if emptied:
        notes.append(
            f"runs took more than {most_bytes / 1e9:g} GB: deleted checkpoints of {few(emptied, 3)}, not their curves"
        )
    if byte_count > most_bytes:
        notes.append(
            f"the runs take {byte_count / 1e9:.1f} GB; their adapters are saved nowhere else: save them, or delete "
            "runs that are not needed"
        )
    return notes


@dataclass(frozen=True)
class RunPlace:
    """Where a training is recorded.

    Attributes:
        store: the runs of the folder.
        name: name of the run to resume; None for a new run.
        model: name of the notebook variable of the model.
        source: text of the command that started the training, with which it can be started again.
        arguments: training arguments to record, if the training runs in other processes than the one that got them.
        origin: name of the adapter from which a sweep starts; empty for other trainings.
    """

    store: RunStore
    name: str | None = None
    model: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    @classmethod
    def of(cls, given: RunPlace | str | os.PathLike[str]) -> RunPlace:
        """Returns a place as it is, or a new one for the path of a folder."""
        return given if isinstance(given, RunPlace) else cls(RunStore(Path(os.path.expanduser(os.fspath(given)))))


@contextlib.contextmanager
def _locked(folder: RunFolder, run_id: str | None = None) -> Iterator[None]:
    """Locks a run while it is renamed, changed or removed; refuses another one than that of an id."""
    folder.open()
    try:
        if run_id is not None and folder.record().id != run_id:
            raise CheckpointError(f"the list is out of date: {folder.name} is another run now; list the runs again")
        yield
    finally:
        folder.close()
