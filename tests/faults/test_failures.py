"""An error at every tensor operation of every command: the model is before or after, never between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.effort import drawn
from tests.faults.commands import run_quietly
from tests.faults.harness import CASES, FailingAt, Harness, Operation


class Counting(TorchDispatchMode):
    """Numbers the operations; notes those that allocate, and those that write into a tensor that was there."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Operation] = []
        self._number = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        self._number += 1
        if not func.is_view:
            self.points.append((self._number, "before"))
        if func._schema.is_mutable:
            self.points.append((self._number, "behind"))
        return func(*args, **(kwargs or {}))


def points_of(harness: Harness) -> list[Operation]:
    """Where the command can fail."""
    stage = harness.stage()
    with Counting() as counting:
        run_quietly(harness.command, stage)
    return counting.points


@pytest.mark.drawn(46)
@pytest.mark.parametrize(("name", "storage"), CASES)
def test_a_command_that_runs_out_of_memory_leaves_the_model_before_or_after(name: str, storage: str) -> None:
    harness = Harness(name, storage)
    points = drawn(points_of(harness), quick=3, seed=CASES.index((name, storage)))
    harness.try_all(points, FailingAt, MemoryError)
