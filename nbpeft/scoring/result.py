"""The result: scores with intervals, the items, paired tests, and how it is shown."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from nbpeft._util.optional import needs
from nbpeft.display.blocks import (
    BarChart,
    Block,
    Box,
    Card,
    Cell,
    Columns,
    Details,
    Line,
    Progress,
    Stack,
    Table,
    Text,
    Tone,
    bold,
    card,
    dim,
    line,
    notes,
)
from nbpeft.display.differences import differences
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import metric as number
from nbpeft.display.numbers import percent, plural
from nbpeft.display.shown import Shown
from nbpeft.errors import ConfigError, cut, did_you_mean
from nbpeft.scoring.items import Flips, MetricFacts, Score, ScoreItem
from nbpeft.scoring.statistics import interval_of_mean, mcnemar, sign_flips, weighted_mean, wilson

Status = Literal["running", "finished", "stopped"]
_SHOWN = 5
"""The greatest number of items under one filter."""
_LONGEST = 800
"""The greatest number of characters that is shown of an answer or a prompt."""
_LABELS, _LABEL = 10, 24
"""The greatest number of references that are counted as labels, and of characters that are shown of each."""


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
        seed: seed of the bootstrap and of permutations, and of sampled answers.
        settings: temperature, top-p and seed of sampled answers; empty for greedy ones.
        done: share of the work that is done, from 0 to 1.
        elsewhere: losses on further rows, or on a general text; None if they were not measured.
        limit: greatest number of tokens of an answer; None if nothing is generated.
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
    elsewhere: ScoreResult | None = None
    limit: int | None = None

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
        facts, values = self.facts, {n: value for n, value in self.values(column).items() if self._counts(n)}
        scaled, weights = [facts.scaled(value) for value in values.values()], self._weights(list(values))
        mean = facts.unscaled(weighted_mean(scaled, weights))
        if facts.is_share:
            low, high = wilson(round(sum(scaled)), len(scaled))
            return Score(mean, low, high, len(scaled), "Wilson")
        low, high, interval = interval_of_mean(scaled, weights, self.seed)
        return Score(mean, facts.unscaled(low), facts.unscaled(high), len(scaled), interval)

    def score_words(self, column: str) -> str:
        """Returns the score of a column with its interval, as text."""
        value, interval = _figures(self, self.scores[column])
        return f"{value} ({interval})" if interval else value

    @cached_property
    def compared(self) -> frozenset[int]:
        """Numbers of the rows over which means are taken.

        If the scoring was stopped, these are the rows on which every column that has any value has one: columns are
        not computed side by side if their adapters are loaded in groups (``folders``).
        """
        numbers = frozenset(item.number for item in self.items)
        if self.status != "stopped":
            return numbers
        return numbers.intersection(*filter(None, map(self.values, self.columns)))

    def _counts(self, number: int) -> bool:
        return number in self.compared

    def _weights(self, numbers: Sequence[int]) -> list[float]:
        if not self.facts.is_weighted:
            return [1.0] * len(numbers)
        weights = {item.number: item.weight for item in self.items}
        return [weights[number] for number in numbers]

    def flips(self, first: str, second: str) -> Flips:
        """The items on which two columns differ, with a paired test.

        Right and wrong items are compared by the exact McNemar test, other values by flipping the signs of their
        differences.

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
            p, test = sign_flips(changes, self._weights(numbers), self.seed), "sign-flip permutation test"
        return Flips(first, second, fixed, broken, len(both), p, test, facts.is_share)

    @property
    def disagreeing(self) -> tuple[ScoreItem, ...]:
        """The items on which the columns have different values."""
        return tuple(item for item in self.items if len(set(item.values.get(self.metric, {}).values())) > 1)

    def confusion(self, column: str) -> dict[str, dict[str, int]]:
        """Reference -> answer of one column -> number of items, without spaces around them.

        Args:
            column: the column.

        Raises:
            ConfigError: there is no such column.
        """
        self._check(column)
        counts: dict[str, Counter[str]] = {}
        for item in self.items:
            if item.reference.strip() and column in item.answers:
                counts.setdefault(item.reference.strip(), Counter())[item.answers[column].strip()] += 1
        return {reference: dict(answers) for reference, answers in counts.items()}

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
        return _as_text(self)

    def view(self) -> Card:
        """Shows the scores as bars with intervals, what each adapter fixed and broke, and the items."""
        shown = self.overview()
        items = () if self.status == "running" else (one.details(self) for one in self.filters() if one.items)
        return card(shown.title, *shown.blocks, *items, aside=shown.aside)

    def overview(self) -> Card:
        """Shows the same without the items."""
        return _overview(self)

    def filters(self) -> tuple[Filter, ...]:
        """The items that each adapter fixed, broke and has wrong; those on which the columns differ; and all."""
        return tuple(_filters(self))


def _as_text(result: ScoreResult) -> str:
    """The scores and tests as lines of text."""
    from nbpeft.display.text import columns

    parts = [_about(result)]
    for facts in result.metrics:
        found = result.by(facts.name)
        title = f"{facts.name} " if len(result.metrics) > 1 else ""
        rows = [(f"{title}{name}", *_figures(found, score)) for name, score in found.scores.items()]
        tests = _tests(found)
        parts += [columns(rows), *(f"  {_words(flips)}" for flips in tests), f"  {_how(found, tests)}"]
    parts += [f"  {words}" for words in _cost(result)]
    return with_notes("\n".join(parts), _notes(result))


def _overview(result: ScoreResult) -> Card:
    """The scores as bars with intervals, and what each adapter fixed and broke."""
    title = f"Scores of {result.model_name}" if result.model_name else "Scores"
    if result.status == "running":
        return card(title, *_running(result), aside=_about(result))
    blocks: list[Block | tuple[Block, ...]] = []
    for facts in result.metrics:
        found = result.by(facts.name)
        heading = (line(bold(facts.name)),) if len(result.metrics) > 1 else ()
        tests = _tests(found)
        blocks += [heading, _bars(found), tuple(map(_line, tests)), line(dim(_how(found, tests)))]
    blocks.append(tuple(map(line, _cost(result))))
    blocks += _confusions(result)
    return card(title, *blocks, notes(_notes(result)), aside=_about(result))


def _about(result: ScoreResult) -> str:
    """Returns e.g. ``exact · 48 items · 12.1 s``."""
    names = ", ".join(facts.name for facts in result.metrics)
    counted = plural(len(result.compared), "item")
    if len(result.compared) < result.total:
        counted = f"{len(result.compared)} of {plural(result.total, 'item')}"
    if result.status == "stopped":
        counted = f"stopped after {counted}"
    drawn = "sampled" if result.settings else ""
    return " · ".join(part for part in (names, counted, drawn, f"{result.seconds:.1f} s") if part)


def _running(result: ScoreResult) -> Iterator[Block]:
    """The progress, and the means so far, without intervals."""
    yield Progress(result.done)
    found = {name: list(result.values(name).values()) for name in result.columns}
    means = [f"{name} {_value(result, sum(values) / len(values))}" for name, values in found.items() if values]
    if means:
        yield line(dim(f"{result.metric} so far: {', '.join(means)}"))
    limit = [] if result.limit is None else [f"each answer has at most {plural(result.limit, 'token')}"]
    yield line(dim(" · ".join([*limit, "an interruption keeps what is scored"])))


def _value(result: ScoreResult, value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return percent(value) if result.facts.is_share else number(value)


def _figures(result: ScoreResult, score: Score) -> tuple[str, str]:
    """The value, and its interval."""
    if not score.count:
        return "not scored", ""
    if math.isnan(score.value):
        return "NaN", ""
    if not score.interval:
        return number(score.value), f"{plural(score.count, 'item')}, too few for an interval"
    if result.facts.is_share:
        return percent(score.value), f"{100 * score.low:.0f}–{100 * score.high:.0f} %"
    return number(score.value), f"{number(score.low)}–{number(score.high)}"


def _bars(result: ScoreResult) -> BarChart:
    scores, shown = result.scores, result.facts.is_share
    finite = [score.high for score in scores.values() if math.isfinite(score.high)]
    whole = 1.0 if shown or (finite and max(finite) <= 1) else max(finite, default=1.0)

    def share(value: float) -> float:
        return min(max(value / whole, 0.0), 1.0) if math.isfinite(value) and whole > 0 else 0.0

    figures = [_figures(result, score) for score in scores.values()]
    return BarChart(
        tuple(
            (name, share(score.value), interval)
            for (name, score), (_, interval) in zip(scores.items(), figures, strict=True)
        ),
        "95 % interval",
        tuple(value for value, _ in figures),
        tuple((share(score.low), share(score.high)) for score in scores.values()),
    )


def _tests(result: ScoreResult) -> list[Flips]:
    """The tests that are shown: each column against the first one, and the best two of the others."""
    first, *others = result.columns
    tests = [result.flips(first, other) for other in others]
    sign = -1 if result.facts.greater_is_better else 1
    comparable = [name for name in others if not math.isnan(result.scores[name].value)]
    ranked = sorted(comparable, key=lambda name: sign * result.scores[name].value)
    if len(ranked) > 1:
        tests.append(result.flips(ranked[1], ranked[0]))
    return [flips for flips in tests if flips.count and not math.isnan(flips.p)]


def _cost(result: ScoreResult) -> Iterator[str]:
    """Yields e.g. ``loss on general text 3.412 with base, 3.583 with orders (+5.0 %)``."""
    further = result.elsewhere
    if further is None:
        return
    first, *others = further.columns
    before = further.scores[first].value
    after = [(name, further.scores[name].value) for name in others]
    changes = (f"{value:.3f} with {name} ({_change(before, value)})" for name, value in after)
    yield ", ".join([f"loss on {further.model_name} {before:.3f} with {first}", *changes])


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before and math.isfinite(after / before) else "NaN"


def _notes(result: ScoreResult) -> tuple[str, ...]:
    """The messages for the user, with those about further rows."""
    further = result.elsewhere
    return result.notes if further is None else (*result.notes, *(f"{further.model_name}: {n}" for n in further.notes))


def _how(result: ScoreResult, tests: Sequence[Flips]) -> str:
    """Returns e.g. ``95 % Wilson intervals; p-values of the exact McNemar test``."""
    intervals = dict.fromkeys(score.interval for score in result.scores.values() if score.interval)
    found = {flips.test for flips in tests}
    return "; ".join([*(f"95 % {one} intervals" for one in intervals), *(f"p-values of the {test}" for test in found)])


def _verdict(flips: Flips) -> str:
    return "" if flips.is_significant else f"{plural(flips.count, 'item')} cannot tell these two apart"


def _words(flips: Flips) -> str:
    """Returns e.g. ``sql against base: fixed 12, broke 3 (p = 0.035)``."""
    verdict = _verdict(flips)
    return f"{flips.second} against {flips.first}: {flips}{f'; {verdict}' if verdict else ''}"


def _line(flips: Flips) -> Line:
    return line(bold(flips.second), dim("against"), f"{flips.first}: {flips}", Text(_verdict(flips), "warning"))


def _confusions(result: ScoreResult) -> Iterator[Details]:
    """The counts of references and answers, folded; none where references are not a few labels that repeat."""
    labels = [name for name, _ in Counter(item.reference.strip() for item in result.items).most_common(_LABELS + 1)]
    if not 2 <= len(labels) <= min(_LABELS, len(result.items) // 2) or "" in labels:
        return
    for column in result.columns:
        counts = result.confusion(column)
        if counts:
            yield Details(f"answers of {column} by reference", _confusion(counts, labels), f"confusion-{id(result):x}")


def _confusion(counts: Mapping[str, Mapping[str, int]], labels: Sequence[str]) -> Table:
    def cells(reference: str) -> Iterator[Cell]:
        answers = counts.get(reference, {})
        yield cut(reference, _LABEL)
        for label in labels:
            count = str(answers.get(label, 0))
            yield Text(count, "success") if label == reference else count if label in answers else dim(count)
        others = sum(count for answer, count in answers.items() if answer not in labels)
        yield str(others) if others else dim("0")

    head = ("reference", *(cut(label, _LABEL) for label in labels), "another answer")
    return Table(head, tuple(tuple(cells(label)) for label in labels), right=tuple(range(1, len(head))))


@dataclass(frozen=True)
class Filter:
    """Items that are shown together.

    Attributes:
        title: what they have in common.
        items: the items.
    """

    title: str
    items: tuple[ScoreItem, ...]

    def __str__(self) -> str:
        return f"{self.title}: {len(self.items)}"

    def matching(self, words: str) -> Filter:
        """The items whose prompt, reference and answers contain each of these words; case is ignored."""
        wanted = words.lower().split()
        return replace(self, items=tuple(item for item in self.items if _contains(item, wanted)))

    def blocks(self, result: ScoreResult, start: int, end: int) -> list[Block]:
        """Some of the items: prompts, references, and answers side by side with their differences marked.

        Args:
            result: the result.
            start: the first one.
            end: the one after the last one.
        """
        return list(itertools.chain.from_iterable(_item(result, item) for item in self.items[start:end]))

    def details(self, result: ScoreResult) -> Details:
        """The first items, folded."""
        blocks, more = self.blocks(result, 0, _SHOWN), len(self.items) - _SHOWN
        if more > 0:
            blocks.append(line(dim(f"and {more} more, in the result's items")))
        return Details(str(self), Stack(tuple(blocks)), group=f"score-{id(result):x}")


def _filters(result: ScoreResult) -> Iterator[Filter]:
    """The filters of the first metric."""
    first, *others = result.columns
    better, worse = ("fixed by", "broken by") if result.facts.is_share else ("better with", "worse with")
    for other in others:
        flips = result.flips(first, other)
        yield Filter(f"{better} {other}", flips.fixed)
        yield Filter(f"{worse} {other}", flips.broken)
    if result.facts.is_share:
        for column in others or (first,):
            wrong = (item for item in result.items if item.values.get(result.metric, {}).get(column) == 0)
            yield Filter(f"wrong with {column}", tuple(wrong))
    if others:
        yield Filter("disagreeing", result.disagreeing)
    yield Filter("all items", result.items)


def _contains(item: ScoreItem, words: Sequence[str]) -> bool:
    texts = "\n".join((item.prompt, item.reference, *item.answers.values())).lower()
    return all(word in texts for word in words)


def _item(result: ScoreResult, item: ScoreItem) -> tuple[Block, ...]:
    """The prompt, the reference, and the answers side by side with their differences from it marked."""
    prompt = line(bold(f"row {item.number}"), Text(_shortened(item.prompt), "dim", wrap="as is"))
    boxes = [Box("reference", ((_shortened(item.reference), False),))] if item.reference else []
    compared = item.reference or item.answers.get(result.columns[0], "")
    boxes += [_box(result, item, column, compared) for column in result.columns]
    return prompt, Columns(tuple(boxes))


def _box(result: ScoreResult, item: ScoreItem, column: str, compared: str) -> Box:
    answer = _shortened(item.answers.get(column, ""))
    runs, _ = differences(answer, _shortened(compared)) if compared else (((answer, False),), "")
    aside, tone = _judged(result, item.values.get(result.metric, {}).get(column))
    answered = column in item.answers
    ending = " …" if column in item.cut else "(nothing)" if answered and not answer.strip() else ""
    return Box(column, runs, aside, ending, tone)


def _judged(result: ScoreResult, value: float | None) -> tuple[str, Tone]:
    """The value of an item as text, and its colour."""
    if value is None:
        return "not counted", "warning"
    if not result.facts.is_share:
        return number(value) if not math.isnan(value) else "NaN", "dim"
    return ("right", "success") if value else ("wrong", "error")


def _shortened(text: str) -> str:
    return cut(text, _LONGEST)
