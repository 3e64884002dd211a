"""SIGINT at every line of every command: the model is before or after, never between."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import nbpeft
from tests.effort import drawn
from tests.faults.commands import run_quietly
from tests.faults.harness import CASES, Harness

PACKAGE = str(Path(nbpeft.__file__).parent)
TWICE = 2
"""Visits of one line that are tried: loops over layers visit it again and again."""

Point = tuple[str, int, int]
"""File, line, and which visit of it."""


@contextmanager
def traced(visit: Callable[[str, int], None]) -> Iterator[None]:
    """Calls back at every line of the package that runs in the block."""

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            visit(frame.f_code.co_filename, frame.f_lineno)
        return local

    def start(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield
    finally:
        sys.settrace(before)


def points_of(harness: Harness) -> list[Point]:
    """Where the command can be interrupted."""
    visits: Counter[tuple[str, int]] = Counter()
    stage = harness.stage()
    with traced(lambda file, line: visits.update([(file, line)])):
        run_quietly(harness.command, stage)
    return [(*place, n + 1) for place, total in sorted(visits.items()) for n in range(min(total, TWICE))]


@contextmanager
def interrupted_at(point: Point) -> Iterator[None]:
    """Sends this process a SIGINT when it comes to a point."""
    left = point[2]

    def visit(file: str, line: int) -> None:
        nonlocal left
        if (file, line) == point[:2]:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    with traced(visit):
        yield


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_an_interrupted_command_leaves_the_model_before_or_after(name: str, storage: str) -> None:
    harness = Harness(name, storage)
    points = drawn(points_of(harness), quick=3, seed=CASES.index((name, storage)))
    harness.try_all(points, interrupted_at, KeyboardInterrupt)
