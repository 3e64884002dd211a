"""The result: scores with intervals, the items, and paired tests between two columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from nbpeft._util.optional import needs
from nbpeft.display.blocks import Card
from nbpeft.display.shown import Shown
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.scoring.statistics import bootstrap, mcnemar, paired_bootstrap, weighted_mean, wilson

SIGNIFICANT = 0.05
"""The p-value below which two columns count as different."""
Status = Literal["running", "finished", "stopped"]


@dataclass(frozen=True)
class MetricFacts:
    """What a result has to know of a metric.

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
        interval: how the interval was computed: ``Wilson`` or ``bootstrap``.
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
        test: the test: ``exact McNemar test`` or ``paired bootstrap``.
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


@dataclass(frozen=True, repr=False)
class ScoreResult(Shown):
    """Scores of the base model and of adapters on the same rows.

    ::

        result = nbpeft.score(model, rows, metric="exact", tokenizer=tokenizer)
        result.scores["sql"].value              # 0.81, with .low and .high
        result.flips("base", "sql").fixed       # the items that only the adapter has right

    Attributes:
        model_name: the notebook variable of the model; empty if it is unknown.
        columns: ``base``, the names of the adapters, and sums such as ``a+b``.
        metrics: the metrics.
        metric: name of the metric of ``scores`` and ``flips``; see ``by`` for another.
        items: the rows that were scored.
        total: number of rows to score; more than ``items`` if the scoring was stopped.
        seconds: total time in seconds.
        status: ``running``, ``finished`` or ``stopped``.
        notes: messages for the user.
        seed: seed of the bootstrap, and of sampled answers.
        settings: temperature, top-p and seed of sampled answers; empty for greedy ones.
        done: share of the work that is done, from 0 to 1.
    """

    model_name: str
    columns: tuple[str, ...]
    metrics: tuple[MetricFacts, ...]
    metric: str
    items: tuple[ScoreItem, ...]
    total: int
    seconds: float = 0.0
    status: Status = "finished"
    notes: tuple[str, ...] = ()
    seed: int = 0
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    done: float = 1.0

    def by(self, metric: str) -> ScoreResult:
        """The same result with the scores of another metric.

        Args:
            metric: name of one of the metrics.

        Raises:
            ConfigError: there is no such metric.
        """
        names = [facts.name for facts in self.metrics]
        if metric not in names:
            hint = did_you_mean(str(metric), names) or f" There are: {', '.join(names)}."
            raise ConfigError(f"the result has no metric {metric!r:.40}.{hint}", field="metric")
        return replace(self, metric=metric)

    @property
    def facts(self) -> MetricFacts:
        """The metric of ``scores`` and ``flips``."""
        return next(facts for facts in self.metrics if facts.name == self.metric)

    def values(self, column: str) -> dict[int, float]:
        """Number of the row -> the value of one column; without rows that it has no value for.

        Args:
            column: the column.

        Raises:
            ConfigError: there is no such column.
        """
        self._check(column)
        found = ((item.number, item.values.get(self.metric, {}).get(column)) for item in self.items)
        return {number: value for number, value in found if value is not None}

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Column -> its score."""
        return {column: self._score(column) for column in self.columns}

    def _score(self, column: str) -> Score:
        facts, values = self.facts, self.values(column)
        scaled, weights = [facts.scaled(value) for value in values.values()], self._weights(list(values))
        mean = facts.unscaled(weighted_mean(scaled, weights))
        if facts.is_share:
            low, high = wilson(round(sum(scaled)), len(scaled))
            return Score(mean, low, high, len(scaled), "Wilson")
        low, high = (facts.unscaled(bound) for bound in bootstrap(scaled, weights, self.seed))
        return Score(mean, low, high, len(scaled), "bootstrap")

    def _weights(self, numbers: Sequence[int]) -> list[float]:
        if not self.facts.is_weighted:
            return [1.0] * len(numbers)
        weights = {item.number: item.weight for item in self.items}
        return [weights[number] for number in numbers]

    def flips(self, first: str, second: str) -> Flips:
        """The items on which two columns differ, with a paired test.

        Right and wrong items are compared by the exact McNemar test, other values by the paired bootstrap.

        Args:
            first: the column to compare with, e.g. ``base``.
            second: the other column.

        Raises:
            ConfigError: there is no such column.
        """
        before, after, facts = self.values(first), self.values(second), self.facts
        sign = 1 if facts.greater_is_better else -1
        both = [item for item in self.items if item.number in before and item.number in after]
        numbers = [item.number for item in both]
        changes = [sign * (facts.scaled(after[n]) - facts.scaled(before[n])) for n in numbers]
        fixed = tuple(item for item, change in zip(both, changes, strict=True) if change > 0)
        broken = tuple(item for item, change in zip(both, changes, strict=True) if change < 0)
        if facts.is_share:
            p, test = mcnemar(len(fixed), len(broken)), "exact McNemar test"
        else:
            p, test = paired_bootstrap(changes, self._weights(numbers), self.seed), "paired bootstrap"
        return Flips(first, second, fixed, broken, len(both), p, test, facts.is_share)

    @property
    def disagreeing(self) -> tuple[ScoreItem, ...]:
        """The items on which the columns have different values."""
        return tuple(item for item in self.items if len(set(item.values.get(self.metric, {}).values())) > 1)

    def to_dataframe(self) -> Any:
        """The items as a pandas DataFrame: a row for each item and column, with a column for each metric.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        with needs("pandas", "to_dataframe"):
            import pandas

        rows = [
            {
                "row": item.number,
                "prompt": item.prompt,
                "reference": item.reference,
                "adapter": column,
                "answer": item.answers.get(column),
                "cut": column in item.cut,
                **{facts.name: item.values.get(facts.name, {}).get(column) for facts in self.metrics},
            }
            for item in self.items
            for column in self.columns
        ]
        return pandas.DataFrame(rows)

    def _check(self, column: str) -> None:
        if column not in self.columns:
            hint = did_you_mean(str(column), self.columns) or f" There are: {', '.join(self.columns)}."
            raise ConfigError(f"nothing called {column!r:.40} was scored.{hint}")

    def __str__(self) -> str:
        from nbpeft.scoring.describe import as_text

        return as_text(self)

    def view(self) -> Card:
        """Shows the scores as bars with intervals, what each adapter fixed and broke, and the items."""
        from nbpeft.scoring.describe import as_card

        return as_card(self)
