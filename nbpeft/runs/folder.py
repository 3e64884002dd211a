"""The folder of one run: what is in it, and who writes it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from nbpeft.checkpoint.atomic import NewFile, replace_files
from nbpeft.checkpoint.staging import lock_folder
from nbpeft.confidential import masked
from nbpeft.errors import CheckpointError
from nbpeft.runs.record import RunRecord, record_of
from nbpeft.state import Curve, Sample

FACTS, CURVE, SERIES, SAMPLES = "run.json", "curve.jsonl", "series.json", "samples.jsonl"
VERSION = 1
"""Of ``run.json``; a newer one is not read."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_END = 4096
"""Bytes at the end of a curve that hold its last step."""


class RunFolder:
    """One run on disk.

    Args:
        path: its folder, which is there.

    Attributes:
        path: its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._curve: IO[str] | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    def open(self) -> None:
        """Takes the run for this process, until ``close`` or the end of the process.

        Raises:
            CheckpointError: another process, or another run of this one, writes it.
        """
        try:
            self._lock = lock_folder(self.path)
        except BlockingIOError:
            raise CheckpointError(f"run {self.name} is still running") from None
        except FileNotFoundError:
            raise CheckpointError(f"run {self.name} was deleted meanwhile") from None

    def close(self) -> None:
        """Gives the run back."""
        if self._curve is not None:
            self._curve.close()
            self._curve = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def running(self) -> bool:
        """Whether a process writes it."""
        if self._lock is not None:
            return True
        try:
            handle = lock_folder(self.path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if handle is not None:
            os.close(handle)
            return False
        facts = self.facts()  # folders cannot be locked here
        return facts.get("host") == platform.node() and psutil.pid_exists(int(facts.get("process") or 0))

    # What it is

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` holds; nothing where it cannot be read."""
        try:
            found = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) and found.get("version") == VERSION else {}

    def record(self) -> RunRecord | None:
        """What is known about the run, or None where that cannot be read."""
        facts = self.facts()
        begun = facts.get("status") == "running"  # its facts are as old as its last state, its curve is not
        running = begun and self.running
        if begun:
            facts |= self._last_logged()
        return record_of(self.name, str(self.path), facts, running=running, kept_steps=self.kept_steps())

    def write(
        self,
        facts: Mapping[str, Any],
        series: Mapping[str, Any] | None = None,
        samples: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """Replaces ``run.json`` and, where they are given, the values over time and the samples.

        Raises:
            CheckpointError: they cannot be written; what was there is as it was.
        """
        files = [NewFile.of_text(FACTS, _text({"version": VERSION, **facts}, indent=2))]
        if series:
            files.append(NewFile.of_text(SERIES, _text(series)))
        if samples:
            files.append(NewFile.of_text(SAMPLES, "".join(f"{_text(sample)}\n" for sample in samples)))
        replace_files(self.path, files)

    def contents(self) -> dict[str, str]:
        """The text of its files besides the states, by name."""
        found = {}
        for name in (FACTS, CURVE, SERIES, SAMPLES):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found[name] = (self.path / name).read_text(encoding="utf-8")
        return found

    def put_back(self, contents: Mapping[str, str]) -> None:
        """Makes its files what ``contents`` has returned earlier.

        Raises:
            CheckpointError: they cannot be written; what was there is as it was.
        """
        replace_files(self.path, [NewFile.of_text(name, text) for name, text in contents.items()])

    # What was logged

    def series(self, until: int) -> dict[str, Curve]:
        """Values over time up to a step, by name."""
        try:
            found = json.loads((self.path / SERIES).read_text(encoding="utf-8"))
            return {name: tuple((s, v) for s, v in points if s <= until) for name, points in found.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}

    def samples(self, until: int) -> tuple[Sample, ...]:
        """Samples up to a step."""
        try:
            lines = (self.path / SAMPLES).read_text(encoding="utf-8").splitlines()
            found = [Sample(**json.loads(line)) for line in lines]
            return tuple(sample for sample in found if sample.step <= until)
        except (OSError, ValueError, TypeError, RecursionError):
            return ()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to the curve; a process that is killed keeps the lines it wrote.

        Raises:
            OSError: it cannot be written.
        """
        if self._curve is None:
            self._curve = open(self.path / CURVE, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._curve.write(f"{_text(entry)}\n")

    def entries(self) -> list[dict[str, Any]]:
        """What was logged, in order; a line that is cut off is left out."""
        try:
            return _entries((self.path / CURVE).read_bytes())
        except OSError:
            return []

    def _last_logged(self) -> dict[str, Any]:
        """Step, loss and seconds of the last step in the curve, of which only the end is read."""
        try:
            with open(self.path / CURVE, "rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - _END, 0))
                steps = [entry for entry in _entries(file.read()) if "loss" in entry]
        except OSError:
            return {}
        return {name: steps[-1][name] for name in ("step", "loss", "seconds") if name in steps[-1]} if steps else {}

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Forgets what was logged after a step, before the run goes on from there; returns what is left.

        Raises:
            CheckpointError: it cannot be written.
        """
        kept = [entry for entry in self.entries() if isinstance(at := entry.get("step"), int) and at <= step]
        replace_files(self.path, [NewFile.of_text(CURVE, "".join(f"{_text(entry)}\n" for entry in kept))])
        return kept

    # States

    def kept_steps(self) -> tuple[int, ...]:
        """Steps that a state is kept of, the last one first."""
        try:
            steps = (int(match[1]) for name in os.listdir(self.path) if (match := _CHECKPOINT.fullmatch(name)))
            return tuple(sorted(steps, reverse=True))
        except OSError:
            return ()

    def byte_count(self) -> int:
        """Bytes of all its files."""
        total = 0
        for path, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(path, name)).st_size
        return total


def _entries(lines: bytes) -> list[dict[str, Any]]:
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found


def _text(value: Any, indent: int | None = None) -> str:
    """JSON as everybody reads it: no NaN, nothing that looks like a token."""
    return masked(json.dumps(_plain(value), indent=indent, ensure_ascii=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    return getattr(value, "value", value)
