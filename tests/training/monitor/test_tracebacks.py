"""Tracebacks that let go of what their frames hold."""

from __future__ import annotations

import itertools

from nbpeft.training.monitor.tracebacks import _chain


def test_errors_that_are_each_others_cause_are_visited_once() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(itertools.islice(_chain(first), 5)) == [first, second]
