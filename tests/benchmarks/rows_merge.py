"""Folding an adapter into a wide layer: time, and memory beyond what was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.harness import Measure, Row, Size, timed
from tests.benchmarks.models import adapted, layer


def peak_extra_bytes(work: Callable[[], object]) -> float:
    """The highest sum of allocations during the work, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


def unload(how: Callable[[Callable[[], object]], float]) -> Callable[[str, Size], Measure]:
    """``merge_and_unload``: for good."""

    def prepare(name: str, size: Size) -> Measure:
        def measure() -> float:
            model: Any = adapted(name, layer(size.wide))
            return how(model.merge_and_unload)

        return measure

    return prepare


def undoable(name: str, size: Size) -> Measure:
    """``merge_adapter``, which can be taken back."""
    model: Any = adapted(name, layer(size.wide))

    def measure() -> float:
        seconds = timed(model.merge_adapter)
        model.unmerge_adapter()
        return seconds

    return measure


ROWS = [
    Row("merge", "merge and unload, d = 2048, fp32", "seconds", 0.2, unload(timed)),
    Row("merge-memory", "its extra memory", "bytes", 0.12, unload(peak_extra_bytes), repeats=1),
    Row("merge-undoable", "merge that can be undone, d = 2048", "seconds", 0.4, undoable),
]
