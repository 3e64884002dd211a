"""A chart of the scores and costs of several trainings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

from nbpeft.display.blocks import BarTable, Card, card
from nbpeft.display.numbers import percent, short_count, size
from nbpeft.display.shares import describe_bar_table
from nbpeft.display.shown import Shown


@dataclass(frozen=True)
class Trained:
    """The score and costs of one training.

    Attributes:
        score: the score of the trained model by ``nbpeft.score``, or a share from 0 to 1.
        parameters: number of trained parameters.
        byte_count: memory that it needed in addition to the model, in bytes.
        seconds: duration of a step, in seconds.
    """

    score: SupportsFloat
    parameters: int
    byte_count: int
    seconds: float


@dataclass(frozen=True, repr=False)
class Costs(Shown):
    """The scores and costs of several trainings: a row for each, with a bar for each figure.

    ::

        Costs("held-out orders", {"LoRA": Trained(score, 4_884_480, 240_000_000, 1.9), "OFT": …})

    Attributes:
        title: the title.
        trained: name -> score and costs.
    """

    title: str
    trained: Mapping[str, Trained]

    def __str__(self) -> str:
        return f"{self.title}: {describe_bar_table(self._table())}"

    def view(self) -> Card:
        """The chart."""
        return card(self.title, self._table())

    def _table(self) -> BarTable:
        items = tuple(self.trained.values())
        scores = [float(item.score) for item in items]
        counts, sizes = [item.parameters for item in items], [item.byte_count for item in items]
        times = [item.seconds for item in items]
        return BarTable(
            tuple(self.trained),
            (
                ("correct", tuple((score, percent(score)) for score in scores)),
                ("parameters", _to_largest(counts, map(short_count, counts))),
                ("memory", _to_largest(sizes, map(size, sizes))),
                ("a step", _to_largest(times, (f"{seconds:.2f} s" for seconds in times))),
            ),
        )


def _to_largest(values: Sequence[float], words: Iterable[str]) -> tuple[tuple[float, str], ...]:
    """Each value as a share of the largest, with its text."""
    largest = max(values, default=0) or 1
    return tuple((value / largest, text) for value, text in zip(values, words, strict=True))
