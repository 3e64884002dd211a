"""The time that a run takes, without its pauses."""

from __future__ import annotations

from collections.abc import Callable


class Stopwatch:
    """Measures time from ``start`` to ``stop``, except between ``pause`` and ``resume``.

    Args:
        clock: returns monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started: float | None = None
        self._paused_at: float | None = None
        self._paused_for = 0.0
        self._stopped: float | None = None

    @property
    def has_stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped is not None

    @property
    def elapsed(self) -> float:
        """Seconds so far; 0 before the start."""
        if self._started is None:
            return 0.0
        end = self._stopped if self._stopped is not None else self._paused_at
        return (self._clock() if end is None else end) - self._started - self._paused_for

    def start(self) -> None:
        """Begins to measure."""
        self._started = self._clock()

    def stop(self) -> None:
        """Ends the measurement."""
        self._stopped = self._clock()

    def pause(self) -> None:
        """Begins a pause."""
        self._paused_at = self._clock()

    def resume(self) -> bool:
        """Ends a pause; returns whether there was one."""
        if self._paused_at is None:
            return False
        self._paused_for += self._clock() - self._paused_at
        self._paused_at = None
        return True

    def mirror(self, elapsed: float, *, paused: bool) -> None:
        """Takes over the time of another process.

        Args:
            elapsed: its seconds so far.
            paused: whether it is in a pause.
        """
        now = self._clock()
        self._started, self._paused_at = now - elapsed, now if paused else None
