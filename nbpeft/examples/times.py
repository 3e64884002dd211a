"""A chart of durations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbpeft.display.blocks import BarChart, Card, card
from nbpeft.display.shown import Shown


@dataclass(frozen=True, repr=False)
class Times(Shown):
    """Durations, shown as bars.

    ::

        Times("until the first answer", {"load": 0.06, "compile": 38.5}, {"compile": "once"})

    Attributes:
        title: the title.
        seconds: name -> duration in seconds.
        notes: name -> a text at the right edge.
        note: the heading of these texts.
    """

    title: str
    seconds: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {', '.join(f'{name} {_words(value)}' for name, value in self.seconds.items())}"

    def view(self) -> Card:
        """The chart."""
        longest = max(self.seconds.values(), default=0) or 1
        bars = tuple((name, value / longest, self.notes.get(name, "")) for name, value in self.seconds.items())
        return card(self.title, BarChart(bars, self.note, tuple(map(_words, self.seconds.values()))))


def _words(seconds: float) -> str:
    """A duration as text: ``21 ms``, ``3.4 s``, ``38 s``."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
