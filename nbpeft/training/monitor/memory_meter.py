"""Measures memory for the states of a run, at little cost and in any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from nbpeft.state import MemoryState

_MOST_READINGS = 1000


class MemoryMeter:
    """Measures memory at most every ``interval`` seconds and for at most 1 % of the time.

    Args:
        measure: measures memory; None for no measurements. Called in any thread.
        clock: returns monotonic time in seconds.
        interval: shortest time between two measurements, in seconds.

    Attributes:
        state: the last measurement; None before the first.
    """

    def __init__(
        self, measure: Callable[[], MemoryState | None] | None, clock: Callable[[], float], interval: float
    ) -> None:
        self.state: MemoryState | None = None
        self.interval = interval
        self._measure = measure
        self._clock = clock
        self._lock = threading.Lock()
        self._due = float("-inf")
        self._readings: deque[tuple[int, int]] = deque(maxlen=_MOST_READINGS)

    def update(self, step: int) -> str:
        """Measures the memory if it is due; returns at once if another thread is measuring.

        Args:
            step: the step to which the measurement belongs.

        Returns:
            Why memory cannot be measured, once; else the empty string.
        """
        now = self._clock()
        if self._measure is None or now < self._due or not self._lock.acquire(blocking=False):
            return ""
        try:
            began = time.perf_counter()
            measured = self._measure()
            self._due = now + max(self.interval, 100 * (time.perf_counter() - began))
            if measured is not None:
                self.state = measured
                self._readings.append((step, sum(part.byte_count for part in measured.parts)))
        except Exception as error:  # a failed measurement must not end a training
            if isinstance(error, RuntimeError) and "during iteration" in str(error):
                return ""  # the optimizer is creating its state in its first step
            self._measure = None
            return f"Memory cannot be measured ({type(error).__name__}: {error}); training continues."
        finally:
            self._lock.release()
        return ""

    def measure_next(self) -> None:
        """Makes the next ``update`` measure, however short the time since the last measurement."""
        self._due = float("-inf")

    def mirror(self, state: MemoryState | None) -> None:
        """Takes over a measurement of another process, and measures no more."""
        self._measure, self.state = None, state

    def take_readings(self) -> list[tuple[int, int]]:
        """Returns the step and the bytes of each measurement since the last call."""
        readings = []
        while self._readings:
            readings.append(self._readings.popleft())
        return readings
