"""Defers an interruption (Ctrl-C, the kernel's stop button) while a change is incomplete.

    with DeferredInterrupts():          # from here on SIGINT is only recorded
        ...                         # a short critical section, e.g. a commit
        check_interrupt()           # in a long one: a place where stopping is safe
    # a recorded interruption is delivered here

Python delivers SIGINT between any two bytecode instructions of the main thread, even inside a ``finally`` block. So
Python code can only guarantee to undo its changes if it defers the signal.
"""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from _signal import getsignal as get_handler  # type: ignore[import-not-found]
from _signal import signal as set_handler  # the functions of `signal` take 5 µs more, to convert handlers to enums
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_STEP = 0.05
"""Seconds between two checks for a recorded interruption during a wait."""


def in_main_thread() -> bool:
    """Whether this is the main thread, in which signals are handled and notebook cells run."""
    return threading.current_thread() is threading.main_thread()


class DeferredInterrupts:
    """Defers SIGINT in the main thread; does nothing in other threads, where Python never delivers it.

    When the outermost block ends, a recorded interruption is passed to the previous signal handler.

    Args:
        to_the_end: ignore ``check_interrupt`` inside the block, for work that has to be finished.

    Attributes:
        noting: the outermost block if it has recorded an interruption, else None. There is at most one, because only
            the main thread has such blocks.
    """

    noting: ClassVar[DeferredInterrupts | None] = None

    def __init__(self, *, to_the_end: bool = False) -> None:
        self._to_the_end = to_the_end
        self._outer: DeferredInterrupts | None = None
        self._finishing = 0
        self._previous: Any = None

    def __enter__(self) -> Self:
        if in_main_thread():
            previous = get_handler(signal.SIGINT)
            # There is one handler in a process, so an outer block is found by the handler that it set.
            holder = _holder(previous)
            if holder is None and callable(previous):
                self._previous = previous
                set_handler(signal.SIGINT, self._note)
                holder = self
            if holder is not None and self._to_the_end:
                self._outer = holder
                holder._finishing += 1
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        DeferredInterrupts.noting = self

    def deliver(self) -> None:
        """Passes a recorded interruption to the previous handler, which usually raises KeyboardInterrupt."""
        if DeferredInterrupts.noting is self:
            DeferredInterrupts.noting = None
            self._previous(signal.SIGINT, sys._getframe())

    def released(self) -> AbstractContextManager[None]:
        """Returns a context manager that does not defer interruptions while its block runs."""
        return nullcontext() if self._previous is None else _Released(self)

    def resume(self) -> None:
        """Defers interruptions again."""
        set_handler(signal.SIGINT, self._note)

    def release(self) -> None:
        """Stops deferring until ``resume``, and delivers a recorded interruption."""
        try:
            set_handler(signal.SIGINT, self._previous)
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
            set_handler(signal.SIGINT, self._previous)
            self.deliver()


class _Released:
    """The context manager of ``DeferredInterrupts.released``.

    It is not a generator, because the ``finally`` part of a generator also runs when the generator is garbage
    collected. If the interruption came before its block was entered, this could be after the outer block has ended, and
    interruptions would be deferred forever.
    """

    def __init__(self, block: DeferredInterrupts) -> None:
        self._block = block

    def __enter__(self) -> None:
        self._block.release()

    def __exit__(self, *error: object) -> None:
        self._block.resume()


def check_interrupt() -> None:
    """Delivers a recorded interruption; called at places inside a long command where it can stop safely."""
    # A class attribute, because this is called thousands of times per command and signal.getsignal takes 10 µs.
    block = DeferredInterrupts.noting
    if block is not None and not block._finishing and in_main_thread():
        block.deliver()


def released_interrupts() -> AbstractContextManager[None]:
    """Returns a context manager that does not defer interruptions while its block runs, for calls of user code."""
    main = in_main_thread()
    block = _holder(get_handler(signal.SIGINT)) if main else None
    return nullcontext() if block is None else block.released()


def wait_for(condition: threading.Condition, *, until: Any) -> None:
    """Waits like ``Condition.wait_for``, but can be interrupted even while interruptions are deferred.

    Args:
        condition: a condition whose lock the caller has acquired.
        until: predicate; the wait ends when it returns a true value.
    """
    while not until():
        condition.wait(_STEP)
        check_interrupt()


class RunningBlock:
    """The stack frame in which a context manager was entered, to find out whether its block still runs.

    An interruption between two instructions can prevent ``__exit__`` from being called. The thread's stack still shows
    that the block has ended.

    Args:
        inside: names of modules whose frames are skipped, because they enter the context manager for their callers.
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
        """Returns whether the block has ended when another block begins; two blocks of one frame follow each other."""
        return (self.thread == other.thread and self._frame is other._frame) or not self.runs()

    def runs(self) -> bool:
        """Returns whether the frame is still running. The frame of a generator can be resumed and counts as running.

        The stack of another thread must not be walked: CPython 3.11 crashes if one of its frames is being cleared
        at that moment. Instead the frame itself is cleared: a running frame raises RuntimeError, and the variables of
        one that has ended are not needed any more, except by a debugger.
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


def _holder(handler: Any) -> DeferredInterrupts | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, DeferredInterrupts) else None
