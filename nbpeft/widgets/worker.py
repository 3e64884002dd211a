"""A thread for the jobs that clicks and sliders start, so that the kernel stays free for the next click.

A new job asks the running one to stop and replaces the waiting one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Stopped = Callable[[], bool]
Job = Callable[[Stopped], None]
"""Its argument is a function that returns whether to stop; a job must not raise."""


class Worker:
    """Runs jobs one after the other in a thread that ends when no job is left."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: tuple[float, Job] | None = None
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> bool:
        """Whether a job is waiting to run."""
        return self._waiting is not None

    def submit(self, job: Job, delay: float = 0.0) -> None:
        """Schedules a job.

        Args:
            job: Replaces the waiting job; the running one is asked to stop.
            delay: Seconds to wait first, in case a newer job replaces it.
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
        """Drops the waiting job and asks the running one to stop; does not wait for its end.

        Returns:
            Whether no job is running: then none will report its end.
        """
        with self._condition:
            self._waiting = None
            if self._stop is not None:
                self._stop.set()
            self._condition.notify_all()
            return self._stop is None

    def wait(self, timeout: float = 30.0) -> bool:
        """Waits until no job is left.

        Args:
            timeout: The longest wait, in seconds.

        Returns:
            False if the timeout passed first.
        """
        with self._condition:
            return self._condition.wait_for(lambda: self._thread is None, timeout)

    def _work(self) -> None:
        while (next_job := self._take()) is not None:
            job, stop = next_job
            job(stop.is_set)

    def _take(self) -> tuple[Job, threading.Event] | None:
        """The next job, once its delay has passed; None if there is none, after which the thread ends."""
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
