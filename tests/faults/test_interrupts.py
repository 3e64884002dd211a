"""SIGINT at the lines of every command, at every one in ``--long``: the model is before or after, never between."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nbpeft.session import Session
from nbpeft.training import Run
from tests.effort import SEED, TIER, drawn
from tests.faults.commands import run_quietly, tiny
from tests.faults.harness import CASES, Harness, traced
from tests.training.support import token_rows, trainable

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


def test_a_run_interrupted_as_it_ends_has_ended() -> None:
    """A session would take it for one that is still running, and refuse every command."""
    code = Run._end.__code__
    with traced(lambda file, line: lines.append(line) if file == code.co_filename else None):
        lines: list[int] = []
        with Run(tiny("dense"), 1):
            pass
    own = {line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno}
    for line in sorted(own.intersection(lines)):
        run = Run(tiny("dense"), 1)
        with pytest.raises(KeyboardInterrupt), interrupted_at((code.co_filename, line, 1)), run:
            pass
        assert run.state.status == "finished"


def test_a_session_has_no_run_after_an_interruption_before_it_ends() -> None:
    session, code = Session(), Run.__exit__.__code__
    model = trainable()
    session.register(model, name="model")
    line = min(line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno)
    options: dict[str, Any] = {"max_steps": 1, "keep": False}
    with pytest.raises(KeyboardInterrupt), interrupted_at((code.co_filename, line, 1)):
        session.train(model, token_rows(4), **options)
    assert not session.context.runs
    assert session.train(model, token_rows(4), **options).status == "finished"


def test_a_sweep_interrupted_as_it_begins_leaves_no_adapters() -> None:
    harness = Harness("sweep", "dense")
    points = drawn([point for point in points_of(harness) if "/sweep/" in point[0]], quick=25)
    assert len(points) >= 25
    harness.try_all(points, interrupted_at, KeyboardInterrupt)
