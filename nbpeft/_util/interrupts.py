"""Holding an interruption (Ctrl-C, the kernel's stop button) back while something is between two states.

    with HeldInterrupts():          # SIGINT is only noted from here on
        ...                         # short: a command that commits
        check_interrupt()           # long: a place where stopping is safe
    # a noted one is delivered here

Python delivers SIGINT between any two instructions of the main thread, a ``finally`` block included.
Nothing that is written in Python can therefore be undone for certain unless the signal is held back.
"""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_STEP = 0.05
"""Seconds that a wait lasts at most before it looks for a noted interruption again."""


class HeldInterrupts:
    """Holds SIGINT back in the main thread; elsewhere, where none is ever delivered, it does nothing.

    What is noted meanwhile goes to the handler that was there before, when the outermost block ends.

    Args:
        to_the_end: let nothing inside stop the block earlier (``check_interrupt``): for what has to be finished.

    Attributes:
        noting: the outermost block, of the one thread that can have one, that has noted an interruption.
    """

    noting: ClassVar[HeldInterrupts | None] = None

    def __init__(self, *, to_the_end: bool = False) -> None:
        self._to_the_end = to_the_end
        self._outer: HeldInterrupts | None = None
        self._finishing = 0
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            holder = _holder(previous)
            if holder is None and callable(previous):
                self._previous = previous
                signal.signal(signal.SIGINT, self._note)
                holder = self
            if holder is not None and self._to_the_end:
                self._outer = holder
                holder._finishing += 1
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        HeldInterrupts.noting = self

    def deliver(self) -> None:
        """Hands a noted interruption on, which usually raises KeyboardInterrupt; without one it does nothing."""
        if HeldInterrupts.noting is self:
            HeldInterrupts.noting = None
            self._previous(signal.SIGINT, sys._getframe())

    def released(self) -> AbstractContextManager[None]:
        """Lets interruptions through while the block runs."""
        return nullcontext() if self._previous is None else _Released(self)

    def resume(self) -> None:
        """Holds interruptions back again."""
        signal.signal(signal.SIGINT, self._note)

    def release(self) -> None:
        """Lets interruptions through, one that was noted first; ``resume`` holds them back again."""
        try:
            signal.signal(signal.SIGINT, self._previous)
            self.deliver()
        except BaseException:
            self.resume()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outer, self._outer = self._outer, None
        if outer is not None:
            outer._finishing -= 1
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self.deliver()


class _Released:
    """The block of ``HeldInterrupts.released``.

    No generator: one whose block was never entered, because the interruption came first, goes on when it is
    collected, and would hold interruptions back after the outer block has ended, for good.
    """

    def __init__(self, held: HeldInterrupts) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held.release()

    def __exit__(self, *error: object) -> None:
        self._held.resume()


def check_interrupt() -> None:
    """Delivers an interruption that is held back: for the places inside a long command where it can stop."""
    held = HeldInterrupts.noting  # asked thousands of times a command, where the signal's handler costs 10 µs to find
    if held is not None and not held._finishing and threading.current_thread() is threading.main_thread():
        held.deliver()


def released_interrupts() -> AbstractContextManager[None]:
    """Lets interruptions through while the block runs, where they are held back: for code of the user's."""
    main = threading.current_thread() is threading.main_thread()
    held = _holder(signal.getsignal(signal.SIGINT)) if main else None
    return nullcontext() if held is None else held.released()


def wait_for(condition: threading.Condition, *, until: Any) -> None:
    """``Condition.wait_for`` that an interruption ends although it is held back.

    Args:
        condition: held by the caller.
        until: a function; the wait ends when it returns something true.
    """
    while not until():
        condition.wait(_STEP)
        check_interrupt()


class RunningBlock:
    """The block that a context is entered for, and whether it still runs.

    An interruption between two instructions can keep a context from being left. The stack of its thread
    tells all the same that the block has ended.

    Args:
        inside: modules whose frames are passed over: they enter the context for somebody else.
    """

    def __init__(self, *inside: str) -> None:
        passed = ("contextlib", __name__, *inside)
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_back is not None and frame.f_globals.get("__name__") in passed:
            frame = frame.f_back
        assert frame is not None
        self.thread = threading.get_ident()
        self._frame = frame

    def ended_before(self, other: RunningBlock) -> bool:
        """Returns whether it has ended, now that another one begins: also where that one runs in the same frame."""
        return (self.thread == other.thread and self._frame is other._frame) or not self.runs()

    def runs(self) -> bool:
        """Returns whether its frame runs. A generator's may come back, and counts as running.

        The stack of another thread is never walked: that crashes CPython 3.11 while a frame of it is being cleared.
        Its own frame can be asked: one that runs refuses to be cleared, and of one that has ended nobody needs the
        variables, but for a debugger.
        """
        if self._frame.f_code.co_flags & _SUSPENDS:
            return True
        if self.thread != threading.get_ident():
            try:
                self._frame.clear()
            except RuntimeError:
                return True
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def _holder(handler: Any) -> HeldInterrupts | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, HeldInterrupts) else None
