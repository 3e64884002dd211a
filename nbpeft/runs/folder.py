"""The folder of one run: reads and writes its files, and locks it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.atomic import NewFile, disk_errors, replace_files
from nbpeft.checkpoint.inside import shown
from nbpeft.checkpoint.staging import lock_folder, probe_lock, sweep
from nbpeft.errors import CheckpointError
from nbpeft.jsonable import as_json
from nbpeft.runs.record import (
    VERSION,
    RunRecord,
    checked_entry,
    checked_facts,
    checked_points,
    checked_sample,
    last_step,
    record_of,
    unreadable,
)
from nbpeft.state import Curve, Sample

FACTS, CURVE, SERIES, SAMPLES = "run.json", "curve.jsonl", "series.json", "samples.jsonl"
LARGEST = {FACTS: 2**22, CURVE: 2**26, SERIES: 2**26, SAMPLES: 2**26}
"""Largest size of each file in bytes; 64 MiB is a curve of about half a million steps."""
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,11})")
_END = 4096
"""Number of bytes at the end of a curve that are read to find its last step."""


class RunFolder:
    """One run on disk.

    Its files may come from somebody else. So links are not followed, sizes are limited and every field is checked.

    Args:
        path: the existing folder of the run.

    Attributes:
        path: the folder of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._curve: IO[str] | None = None

    @property
    def name(self) -> str:
        """Name of the run, with unprintable characters escaped."""
        return shown(self.path.name)

    def open(self) -> None:
        """Locks the run for this process until ``close`` or the end of the process.

        Raises:
            CheckpointError: another process, or another training in this process, has locked it.
        """
        try:
            self._lock = lock_folder(self.path)
        except BlockingIOError:
            raise CheckpointError(f"run {self.name} is still running") from None
        except FileNotFoundError:
            raise CheckpointError(f"run {self.name} was deleted in the meantime") from None

    def close(self) -> None:
        """Releases the lock."""
        if self._curve is not None:
            self._curve.close()
            self._curve = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def running(self) -> bool:
        """Whether a process is writing the run."""
        if self._lock is not None:
            return True
        try:
            handle = probe_lock(self.path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if handle is not None:
            os.close(handle)
            return False
        try:
            facts = self.facts()  # folders cannot be locked on this system: ask for the process
        except CheckpointError:
            return False
        return facts.get("host") == platform.node() and psutil.pid_exists(facts.get("process") or 0)

    # Record

    def facts(self) -> dict[str, Any]:
        """Returns the checked content of ``run.json``; empty if there is none.

        Raises:
            CheckpointError: it cannot be read, or a field is invalid.
        """
        content = self._content(FACTS)
        return {} if content is None else checked_facts(content)

    def record(self) -> RunRecord:
        """Returns the record of the run; its message says why if the run cannot be read."""
        if not self.path.name.isprintable():
            return unreadable(self.name, shown(self.path), "its name has unprintable characters")
        try:
            facts = self.facts()
            begun = facts.get("status") == "running"  # run.json is as old as the last checkpoint, unlike the curve
            running = begun and self.running
            if begun:
                facts |= self._last_logged(facts.get("headline") or ("loss",))
            kept_steps = self.kept_steps()
        except CheckpointError as error:
            return unreadable(self.name, str(self.path), error.message)
        if not facts:
            return unreadable(self.name, str(self.path), f"it has no {FACTS}")
        return record_of(self.name, str(self.path), facts, running=running, kept_steps=kept_steps)

    def _content(self, name: str) -> bytes | None:
        """Returns the content of a file, or None if there is none; an interrupted write is finished first."""
        try:
            if inside.is_folder(self.path.parent, self.path.name):
                sweep(self.path, report=False)
            return inside.read_plain(self.path.parent, f"{self.path.name}/{name}", LARGEST[name])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{name} of run {self.name} cannot be read: {error.strerror}") from None

    def _opened(self, name: str, flags: int) -> int:
        return inside.open_plain(self.path.parent, f"{self.path.name}/{name}", flags)

    def write(
        self,
        facts: Mapping[str, Any],
        series: Mapping[str, Any] | None = None,
        samples: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """Replaces ``run.json`` and, if given, the series and the samples, atomically.

        Args:
            facts: fields of ``run.json``.
            series: name -> values over time; None leaves the file unchanged.
            samples: answers generated during training; None leaves the file unchanged.

        Raises:
            CheckpointError: the files cannot be written; nothing was changed.
        """
        with disk_errors(self.path):
            self.flush()
        files = [NewFile.of_text(FACTS, _text({"version": VERSION, **facts}, indent=2))]
        if series:
            files.append(NewFile.of_text(SERIES, _text(series)))
        if samples:
            files.append(NewFile.of_text(SAMPLES, "".join(f"{_text(sample)}\n" for sample in samples)))
        replace_files(self.path, files)

    def end(self, facts: Mapping[str, Any]) -> None:
        """Records how a run ended, even on a full disk: then the existing file is overwritten in place.

        If that fails too, nothing is changed and no error is raised.
        """
        with contextlib.suppress(CheckpointError, OSError):
            before = self.facts()
            try:
                self.write({**before, **facts})
            except CheckpointError:
                known = {name: facts.get(name) for name in ("status", "step", "loss", "seconds", "updated")}
                text = _text({**before, **known}).encode()
                handle = self._opened(FACTS, os.O_WRONLY)
                try:
                    size = os.fstat(handle).st_size  # the existing text is indented, so the compact one fits
                    if len(text) <= size:
                        os.write(handle, text.ljust(size))
                finally:
                    os.close(handle)

    def contents(self) -> dict[str, str]:
        """Returns the text of the run's files by name, without checkpoints.

        Raises:
            CheckpointError: a file cannot be read.
        """
        found = {name: self._content(name) for name in LARGEST}
        return {name: content.decode("utf-8", "replace") for name, content in found.items() if content is not None}

    def restore(self, contents: Mapping[str, str]) -> None:
        """Restores the files that ``contents`` returned earlier.

        Raises:
            CheckpointError: the files cannot be written; nothing was changed.
        """
        replace_files(self.path, [NewFile.of_text(name, text) for name, text in contents.items()])

    # Log

    def series(self, until: int) -> dict[str, Curve]:
        """Returns the values over time by name, up to and including a step.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            found = json.loads(self._content(SERIES) or b"{}")
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            return {}
        named = found.items() if isinstance(found, dict) else ()
        return {name: points for name, given in named if (points := checked_points(given, until))}

    def samples(self, until: int) -> tuple[Sample, ...]:
        """Returns the samples up to and including a step.

        Raises:
            CheckpointError: the file cannot be read.
        """
        found = map(checked_sample, _lines(self._content(SAMPLES) or b""))
        return tuple(sample for sample in found if sample is not None and sample.step <= until)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Appends a line to the curve; it is written at once, so that a killed process loses nothing.

        Raises:
            OSError: the file cannot be written.
        """
        if self._curve is None:
            handle = self._opened(CURVE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._curve = open(handle, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._curve.write(f"{_text(entry)}\n")

    def flush(self) -> None:
        """Flushes the curve to disk, so that what is written next does not survive a crash without it.

        Raises:
            OSError: the file cannot be written.
        """
        if self._curve is not None:
            os.fsync(self._curve.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """Returns the log entries in order, without an incomplete last line.

        Raises:
            CheckpointError: the curve cannot be read.
        """
        return _entries(self._content(CURVE) or b"")

    def _last_logged(self, headline: Iterable[str]) -> dict[str, Any]:
        """Returns step, loss, seconds and headline of the last entry; reads only the end of the curve."""
        try:
            with open(self._opened(CURVE, os.O_RDONLY), "rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - _END, 0))
                return last_step(_entries(file.read(_END)), headline)
        except OSError:
            return {}

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Removes the log entries after a step, before the run resumes from it.

        Returns:
            The remaining entries.

        Raises:
            CheckpointError: the curve cannot be written.
        """
        kept = [entry for entry in self.entries() if isinstance(at := entry.get("step"), int) and at <= step]
        replace_files(self.path, [NewFile.of_text(CURVE, "".join(f"{_text(entry)}\n" for entry in kept))])
        return kept

    # Checkpoints

    def kept_steps(self) -> tuple[int, ...]:
        """Returns the steps of the run's checkpoints in descending order.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        home, name = self.path.parent, self.path.name
        try:
            matches = [match for entry in inside.names(home, name) if (match := _CHECKPOINT.fullmatch(entry))]
            steps = [int(match[1]) for match in matches if inside.is_folder(home, f"{name}/{match[0]}")]
        except OSError as error:
            raise CheckpointError(f"the folder of run {self.name} cannot be read: {error.strerror}") from None
        return tuple(sorted(steps, reverse=True))

    def byte_count(self) -> int:
        """Returns the size of all files of the run in bytes."""
        total = 0
        for path, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(path, name)).st_size
        return total


def _entries(content: bytes) -> list[dict[str, Any]]:
    return [entry for line in _lines(content) if (entry := checked_entry(line)) is not None]


def _lines(content: bytes) -> Iterator[Any]:
    """Yields the values of the lines that are valid JSON."""
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


def _text(value: Any, indent: int | None = None) -> str:
    """Returns a value as strict JSON, with NaN as null and access tokens masked."""
    return json.dumps(as_json(value), indent=indent, ensure_ascii=False)
