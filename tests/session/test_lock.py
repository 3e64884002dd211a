"""The lock of commands: who has to wait, and that an interruption anywhere leaves nothing held."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from nbpeft.errors import BusyError
from nbpeft.session import Session, context, lock
from tests.waiting import PATIENCE

TRACED = {context.__file__, lock.__file__, contextlib.__file__}


def in_another_thread(act: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(act())
        except BusyError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    return found[0]


def interrupted(act: Callable[[], None], number: int) -> tuple[KeyboardInterrupt | None, bool]:
    """Sends a SIGINT at the number-th line of the lock and of what is around it.

    Returns:
        What came of it, as a notebook keeps it, with all its frames, and whether there are so many lines.
    """
    lines = itertools.count(1)

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and next(lines) == number:
            signal.raise_signal(signal.SIGINT)
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename in TRACED else None)
    try:
        act()
    except KeyboardInterrupt as error:
        return error, True
    finally:
        sys.settrace(None)
    return None, next(lines) > number


@pytest.mark.parametrize("slow", [False, True])
def test_a_command_that_was_interrupted_anywhere_holds_nothing(session: Session, slow: bool) -> None:
    ctx = session.context

    def command() -> None:
        with ctx.command("adding", slow=slow):
            warnings.warn("taken", stacklevel=1)

    command()
    before, kept = (warnings.showwarning, list(warnings.filters)), list[Any]()
    for number in itertools.count(1):
        error, there = interrupted(command, number)
        kept.append(error)
        assert (ctx.lock.busy, ctx.lock.depth) == ("", 0), number
        assert in_another_thread(lambda: ctx.lock.take("merging", lock.RunningBlock())).description == "merging"
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warnings.warn("shown", stacklevel=1)
        assert [str(item.message) for item in seen] == ["shown"], number
        with pytest.warns(UserWarning, match="shown"):
            warnings.warn("shown", stacklevel=1)
        if not there:
            break
    assert sum(error is not None for error in kept) > 30
    assert (warnings.showwarning, list(warnings.filters)) == before


def test_the_same_thread_takes_it_again_and_others_are_refused(session: Session) -> None:
    ctx = session.context

    def inner() -> tuple[str, int]:
        with ctx.command("adding"):
            return ctx.lock.busy, ctx.lock.depth

    with ctx.command("merging"):
        assert inner() == ("merging", 2)
        error = in_another_thread(lambda: ctx.command("scaling").__enter__())
        assert str(error) == "busy: merging; try again when it has finished"
    assert (ctx.lock.busy, ctx.lock.depth) == ("", 0)


def test_a_command_waits_for_who_only_looks(session: Session) -> None:
    looking, go_on = threading.Event(), threading.Event()

    def look() -> None:
        with session.context.lock.try_lock() as free:
            assert free
            looking.set()
            go_on.wait(PATIENCE)

    thread = threading.Thread(target=look)
    thread.start()
    assert looking.wait(PATIENCE)
    threading.Timer(0.1, go_on.set).start()
    with session.context.command("adding"):
        assert go_on.is_set()
    thread.join(PATIENCE)
