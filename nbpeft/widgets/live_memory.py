"""Memory in use, measured repeatedly while a command runs, and once after every change otherwise."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable

from nbpeft.state import MemoryState

INTERVAL = 0.6
"""Least seconds between two measurements."""
SHARE = 0.005
"""The greatest share of time spent on measuring."""


_measuring: weakref.WeakSet[LiveMemory] = weakref.WeakSet()


class LiveMemory:
    """A thread that measures while the memory can change. It has no lock while it measures.

    Args:
        measure: Returns the memory now, or None; may raise while the model is being changed.
        show: Called with each measurement.
    """

    def __init__(self, measure: Callable[[], MemoryState | None], show: Callable[[MemoryState | None], None]) -> None:
        self._measure, self._show = measure, show
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._running = self._asked = False
        _measuring.add(self)

    def look(self, *, running: bool) -> None:
        """Requests a measurement, and repeated ones while a command runs."""
        with self._lock:
            self._running, self._asked = running, True
            self._wake.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="nbpeft-memory", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Stops measuring."""
        with self._lock:
            self._running = self._asked = False
            self._wake.set()

    def join(self) -> None:
        """Stops measuring, and waits for a measurement that has begun."""
        thread = self._thread
        self.stop()
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while self._should_measure():
            begun = time.thread_time()
            with contextlib.suppress(Exception):  # another thread is changing the model: measure again next time
                self._show(self._measure())
            self._wake.wait(max(INTERVAL, (time.thread_time() - begun) / SHARE))

    def _should_measure(self) -> bool:
        """Whether to measure again; otherwise the thread ends."""
        with self._lock:
            if not (self._running or self._asked):
                self._thread = None
                return False
            self._asked = False
            return True


@atexit.register
def _join_all() -> None:
    """Ends all measurements: an interpreter that ends while a thread is inside torch aborts the process."""
    for measuring in list(_measuring):
        measuring.join()
