"""The parts of a result: scores with intervals, items with their answers, and what two columns differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SIGNIFICANT = 0.05
"""The p-value below which two columns count as different."""


@dataclass(frozen=True)
class MetricFacts:
    """What a result has to know about a metric.

    Attributes:
        name: its name.
        greater_is_better: whether a greater value is better.
        is_share: whether each item is right or wrong, so that the score is a share.
        is_perplexity: whether the mean is taken of the logarithms.
        is_weighted: whether an item counts by its number of tokens.
    """

    name: str
    greater_is_better: bool = True
    is_share: bool = True
    is_perplexity: bool = False
    is_weighted: bool = False

    def scaled(self, value: float) -> float:
        """A value as it enters a mean."""
        return math.log(value) if self.is_perplexity and value > 0 else value

    def unscaled(self, value: float) -> float:
        """A mean as it is shown."""
        return math.exp(min(value, 700.0)) if self.is_perplexity else value


@dataclass(frozen=True)
class Score:
    """The score of one column, with a 95 % interval.

    Attributes:
        value: the share of right items, or the mean.
        low: lower bound of the interval.
        high: upper bound of the interval.
        count: number of items.
        interval: how the interval was computed: ``Wilson``, ``t`` or ``bootstrap``; empty for no interval.
    """

    value: float
    low: float
    high: float
    count: int
    interval: str

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class ScoreItem:
    """One row with its answers.

    Attributes:
        number: its number in the data, 0 for the first.
        prompt: the prompt as text.
        reference: the right answer; empty if there is none.
        answers: column -> answer; without the columns that did not answer.
        values: metric -> column -> value; without items on which the metric failed.
        cut: the columns whose answer reached the greatest length.
        weight: number of tokens of the loss; 1 for other metrics.
    """

    number: int
    prompt: str
    reference: str
    answers: Mapping[str, str] = field(default_factory=dict, hash=False)
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)
    cut: frozenset[str] = frozenset()
    weight: float = 1.0


@dataclass(frozen=True)
class Flips:
    """The items on which two columns differ, and whether the difference is more than chance.

    Attributes:
        first: the column that is compared with.
        second: the other column.
        fixed: the items that the second one has right, or better, and the first one does not.
        broken: the reverse.
        count: number of items that both answered.
        p: p-value of the test.
        test: the test: ``exact McNemar test`` or ``sign-flip permutation test``.
        is_share: whether items are right or wrong.
    """

    first: str
    second: str
    fixed: tuple[ScoreItem, ...]
    broken: tuple[ScoreItem, ...]
    count: int
    p: float
    test: str
    is_share: bool = True

    @property
    def is_significant(self) -> bool:
        """Whether the items can tell the two apart, at the level 0.05."""
        return self.p < SIGNIFICANT

    def __str__(self) -> str:
        words = ("fixed", "broke") if self.is_share else ("better on", "worse on")
        chance = f"p {'< 0.001' if self.p < 0.001 else f'= {self.p:.2g}'}"
        return f"{words[0]} {len(self.fixed)}, {words[1]} {len(self.broken)} ({chance})"
