"""A loss curve that stays small however long a run is."""

from __future__ import annotations

import math


class History:
    """(step, value) pairs, decimated to the lowest and the highest value per bucket of steps.

    All points are kept until there are more than ``buckets`` of them; from then on neighbouring
    buckets are merged whenever there are too many. Spikes survive, and at most
    ``2 * buckets`` points remain.

    Args:
        buckets: Most buckets kept; even and at least 2.
    """

    def __init__(self, buckets: int = 240) -> None:
        self._limit = buckets
        self._width = 1
        self._buckets: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}

    def add(self, step: int, value: float) -> None:
        """Notes a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._put(step, (step, value), (step, value))
        while len(self._buckets) > self._limit:
            old, self._buckets = self._buckets, {}
            self._width *= 2
            for low, high in old.values():
                self._put(low[0], low, low)
                self._put(high[0], high, high)

    def _put(self, step: int, low: tuple[int, float], high: tuple[int, float]) -> None:
        key = step // self._width
        if key in self._buckets:
            old_low, old_high = self._buckets[key]
            low = min(old_low, low, key=lambda point: point[1])
            high = max(old_high, high, key=lambda point: point[1])
        self._buckets[key] = (low, high)

    def points(self) -> tuple[tuple[int, float], ...]:
        """The pairs to draw, by step."""
        return tuple(
            point
            for key in sorted(self._buckets)
            for point in sorted(set(self._buckets[key]), key=lambda pair: pair[0])
        )


class Smoothed:
    """An exponential moving average that is not drawn towards zero at its start.

    Args:
        weight: Share of the past in each new value, in [0, 1).
    """

    def __init__(self, weight: float = 0.9) -> None:
        self._weight = weight
        self._total = 0.0
        self._mass = 0.0

    def add(self, value: float) -> None:
        """Takes a value in; one that is not finite is left out."""
        if math.isfinite(value):
            self._total = self._weight * self._total + (1 - self._weight) * value
            self._mass = self._weight * self._mass + (1 - self._weight)

    @property
    def value(self) -> float | None:
        """The average, or None before the first value."""
        return self._total / self._mass if self._mass else None
