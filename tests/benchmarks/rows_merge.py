"""Folding an adapter into a wide layer: time, and memory beyond what was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile

from nbpeft.engine.changes import spill_file
from tests.benchmarks.harness import Measure, Row, Size, timed
from tests.benchmarks.models import adapted, layers


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


def wide(name: str, size: Size) -> Any:
    """Some wide layers with an adapter each."""
    return adapted(name, layers(size.wide, count=size.wide_layers))


def for_good(name: str, size: Size) -> Measure:
    """Seconds of ``merge_and_unload``, per layer."""

    def measure() -> float:
        model = wide(name, size)
        return timed(model.merge_and_unload) / size.wide_layers

    return measure


def where_memory_is_short(measure: Measure) -> Measure:
    """The same measure where backups have to go to disk."""

    def measured() -> float:
        with mock.patch.object(spill_file, "host_memory", lambda: (1, 0)):
            return measure()

    return measured


def for_good_on_disk(name: str, size: Size) -> Measure:
    """Seconds of ``merge_and_unload`` with backups on disk, per layer."""
    return where_memory_is_short(for_good(name, size))


def for_good_memory(name: str, size: Size) -> Measure:
    """Peak of extra bytes of ``merge_and_unload`` with backups on disk."""

    def measure() -> float:
        model = wide(name, size)
        return peak_extra_bytes(model.merge_and_unload)

    return where_memory_is_short(measure)


def undoable(name: str, size: Size) -> Measure:
    """Seconds of ``merge_adapter``, which can be taken back, per layer."""
    model = wide(name, size)

    def measure() -> float:
        seconds = timed(model.merge_adapter)
        model.unmerge_adapter()
        return seconds / size.wide_layers

    return measure


ROWS = [
    Row("merge", "merge and unload, d = 2048, fp32, per layer", "seconds", 0.95, for_good),
    Row("merge-disk", "the same where memory is short", "seconds", 1.2, for_good_on_disk),
    Row("merge-memory", "its peak of extra memory", "bytes", 0.12, for_good_memory, repeats=1),
    Row("merge-undoable", "merge that can be undone (keeps a copy), per layer", "seconds", 1.0, undoable),
]
