"""One thread that does the newest job: a click or a slider asks for something that takes long.

While it works, the kernel stays free for the next click. A new job asks the one that runs to stop
and takes the place of one that waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Stopped = Callable[[], bool]
Job = Callable[[Stopped], None]
"""Gets a function that says whether to stop; must not raise."""


class Worker:
    """Runs jobs one after the other in a thread that ends when there is nothing to do."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: tuple[float, Job] | None = None
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> bool:
        """Whether a job waits for its turn."""
        return self._waiting is not None

    def submit(self, job: Job, delay: float = 0.0) -> None:
        """Has a job done.

        Args:
            job: Takes the place of a job that waits; one that runs is asked to stop.
            delay: Seconds to wait for a newer one first.
        """
        with self._condition:
            self._waiting = (time.monotonic() + delay, job)
            if self._stop is not None:
                self._stop.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="nbpeft-answers", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def stop(self) -> bool:
        """Drops the job that waits and asks the one that runs to stop; does not wait for it.

        Returns:
            Whether none runs: then no job will report its end.
        """
        with self._condition:
            self._waiting = None
            if self._stop is not None:
                self._stop.set()
            self._condition.notify_all()
            return self._stop is None

    def wait(self, timeout: float = 30.0) -> bool:
        """Waits until nothing is left to do; says whether that came about."""
        with self._condition:
            return self._condition.wait_for(lambda: self._thread is None, timeout)

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            job, stop = taken
            job(stop.is_set)

    def _take(self) -> tuple[Job, threading.Event] | None:
        """The next job once its time has come; None, and the thread is done, where there is none."""
        with self._condition:
            self._stop = None
            while self._waiting is not None:
                due, job = self._waiting
                left = due - time.monotonic()
                if left <= 0:
                    self._waiting, self._stop = None, threading.Event()
                    return job, self._stop
                self._condition.wait(left)
            self._thread = None
            self._condition.notify_all()
            return None
