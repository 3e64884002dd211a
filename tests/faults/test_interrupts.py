"""SIGINT at the lines of every command, at every one in ``--long``: the model is before or after, never between."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.effort import SEED, TIER, drawn
from tests.faults.commands import run_quietly
from tests.faults.harness import CASES, Harness, traced

TWICE = 2
"""Visits of one line that ``--long`` tries, others one of them: loops over layers visit it again and again."""

Point = tuple[str, int, int]
"""File, line, and which visit of it."""


def points_of(harness: Harness) -> list[Point]:
    """Where the command can be interrupted."""
    visits: Counter[tuple[str, int]] = Counter()
    stage = harness.stage()
    with traced(lambda file, line: visits.update([(file, line)])):
        run_quietly(harness.command, stage)
    if TIER == "long":
        return [(*place, n + 1) for place, total in sorted(visits.items()) for n in range(min(total, TWICE))]
    draws = random.Random(SEED)
    return [(*place, draws.randint(1, min(total, TWICE))) for place, total in sorted(visits.items())]


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

    with traced(visit, only=point[:2]):
        yield


@pytest.mark.drawn(46)
@pytest.mark.parametrize(("name", "storage"), CASES)
def test_an_interrupted_command_leaves_the_model_before_or_after(name: str, storage: str) -> None:
    harness = Harness(name, storage)
    points = drawn(points_of(harness), quick=3, full=80, seed=CASES.index((name, storage)))
    harness.try_all(points, interrupted_at, KeyboardInterrupt)


def test_a_sweep_interrupted_as_it_begins_leaves_no_adapters() -> None:
    harness = Harness("sweep", "dense")
    points = drawn([point for point in points_of(harness) if "/sweep/" in point[0]], quick=25)
    assert len(points) >= 25
    harness.try_all(points, interrupted_at, KeyboardInterrupt)
