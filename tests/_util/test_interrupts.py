"""Interruptions are held back no longer than the block, wherever one comes."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from nbpeft._util import interrupts
from nbpeft._util.interrupts import DeferredInterrupts, RunningBlock, check_interrupt, released_interrupts
from tests.waiting import PATIENCE


def held_and_released(seen: list[str]) -> None:
    with DeferredInterrupts():
        seen.append("held")
        with released_interrupts():
            seen.append("released")
        check_interrupt()
        seen.append("held again")


def interrupting_at(number: int, visits: list[int]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that sends SIGINT at the n-th line or return of the module and what it calls."""
    files = (interrupts.__file__, contextlib.__file__, __file__)

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event in ("line", "return"):
            visits.append(frame.f_lineno)
            if len(visits) == number:
                signal.raise_signal(signal.SIGINT)
        return local

    return lambda frame, event, argument: local if frame.f_code.co_filename in files else None


def run_traced(number: int) -> tuple[list[int], bool]:
    """Runs the blocks with an interruption; gives the visits, and whether it was seen."""
    visits: list[int] = []
    before = sys.gettrace()
    try:
        sys.settrace(interrupting_at(number, visits))
        try:
            held_and_released([])
        finally:
            sys.settrace(before)
    except KeyboardInterrupt:
        return visits, True
    return visits, False


def test_the_handler_is_back_wherever_an_interruption_comes() -> None:
    handler = signal.getsignal(signal.SIGINT)
    total, _ = run_traced(0)
    assert len(total) > 20
    gc.collect()
    gc.freeze()  # each of the collections below goes over what a visit leaves alone
    for number in range(1, len(total) + 1):
        _, seen = run_traced(number)
        gc.collect()  # a generator whose block was never entered ends here
        assert signal.getsignal(signal.SIGINT) == handler, f"visit {number}"
        assert seen, f"visit {number}: the interruption was lost"


def test_one_that_was_noted_comes_when_it_is_let_through() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupts():
        signal.raise_signal(signal.SIGINT)
        seen.append("held")
        with released_interrupts():
            seen.append("let through")
    assert seen == ["held"]


def test_another_thread_sees_whether_a_block_runs() -> None:
    entered, go_on = threading.Event(), threading.Event()
    blocks: list[RunningBlock] = []

    def work() -> None:
        blocks.append(RunningBlock())
        entered.set()
        go_on.wait(PATIENCE)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(PATIENCE)
    assert blocks[0].runs()
    go_on.set()
    thread.join(PATIENCE)
    assert not blocks[0].runs()
