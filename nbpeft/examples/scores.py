"""A chart that compares scores of several models, prompts or tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol, SupportsFloat, runtime_checkable

from nbpeft.display.blocks import BarChart, Block, Grid, card
from nbpeft.display.numbers import percent
from nbpeft.display.shown import Shown
from nbpeft.errors import ConfigError

Key = str | tuple[str, str]


@runtime_checkable
class Interval(SupportsFloat, Protocol):
    """A value with the bounds of its interval, such as a score of ``nbpeft.score``."""

    @property
    def low(self) -> float:
        """The lower bound."""

    @property
    def high(self) -> float:
        """The upper bound."""


class Scores(Shown, MutableMapping[Key, SupportsFloat]):
    """Scores by name, shown as one chart: bars, or a grid if the names are pairs (row, column).

    ::

        scores = Scores("held-out orders", {"base model": result.scores["base"]})
        scores["adapter"] = result.scores["codes"]

    Args:
        title: the title.
        scores: name -> a score of ``nbpeft.score``, or a share from 0 to 1.
    """

    def __init__(self, title: str = "correct answers", scores: Mapping[Any, SupportsFloat] | None = None) -> None:
        self.title = title
        self._scores: dict[Key, SupportsFloat] = {}
        self.update(scores or {})

    def __getitem__(self, name: Key) -> SupportsFloat:
        return self._scores[name]

    def __setitem__(self, name: Key, value: SupportsFloat) -> None:
        if not isinstance(value, SupportsFloat) or not 0 <= float(value) <= 1:
            raise ConfigError(f"{name!r}: expected a score, or a share from 0 to 1, not {value!r:.60}")
        if any(isinstance(name, tuple) != isinstance(other, tuple) for other in self._scores):
            raise ConfigError("either all scores have single names, or all have pairs of names (row, column)")
        self._scores[name] = value

    def __delitem__(self, name: Key) -> None:
        del self._scores[name]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __str__(self) -> str:
        words = (
            f"{' on '.join(name) if isinstance(name, tuple) else name} {percent(float(v))}" for name, v in self.items()
        )
        return f"{self.title}: {', '.join(words)}"

    def view(self) -> Block:
        """The chart."""
        pairs = {name: float(value) for name, value in self.items() if isinstance(name, tuple)}
        if pairs:
            return card(self.title, Grid(tuple(pairs.items())))
        known = [(value.low, value.high) for value in self.values() if isinstance(value, Interval)]
        intervals = known if len(known) == len(self) else []
        figures = [f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in intervals] or [""] * len(self)
        bars = tuple((str(name), float(value), text) for (name, value), text in zip(self.items(), figures, strict=True))
        return card(self.title, BarChart(bars, "95 % interval" if intervals else "", intervals=tuple(intervals)))
