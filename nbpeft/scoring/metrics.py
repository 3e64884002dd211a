"""The metrics, by name or as functions, and what each of them needs."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from nbpeft._util.numeric import is_finite_number
from nbpeft.errors import ConfigError, TrainingError, check_bool, did_you_mean, in_one_line, with_article
from nbpeft.names import METRICS

Needs = Literal["answers", "options", "tokens", "classes"]
"""What is computed for a metric: generated answers, the likelihood of each option, the loss of the learned tokens, or
the class of a text."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
PATTERN = "pattern"
"""The column of a row with its regular expression."""


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are compared with references.

    Attributes:
        strip: whether white space at both ends is ignored.
        casefold: whether upper and lower case are ignored.
        pattern: a regular expression for all rows; None takes that of each row.
        tolerance: the relative tolerance of numbers.

    Raises:
        ConfigError: a value is invalid.
    """

    strip: bool = False
    casefold: bool = False
    pattern: str | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_bool("strip", self.strip)
        check_bool("casefold", self.casefold)
        if self.pattern is not None:
            _compiled(self.pattern, ConfigError)
        if not (is_finite_number(self.tolerance) and self.tolerance >= 0):
            raise ConfigError(f"tolerance must be a number of at least 0, not {self.tolerance!r:.40}")

    def text(self, text: str) -> str:
        """A text as it is compared."""
        text = text.strip() if self.strip else text
        return text.casefold() if self.casefold else text


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: its name.
        needs: what is computed for it.
        value: (answer, reference, row) -> the value of one item; None if it is computed with the likelihoods.
        needs_reference: whether each row needs a reference.
        greater_is_better: whether a greater value is better.
        is_share: whether an item is right or wrong; None: if all its values are True or False.
        is_perplexity: whether the mean is taken of the logarithms.
        check: (reference, row) -> why a row cannot be scored; empty if it can.
    """

    name: str
    needs: Needs
    value: Callable[[str, str, Any], Any] | None = None
    needs_reference: bool = True
    greater_is_better: bool = True
    is_share: bool | None = True
    is_perplexity: bool = False
    check: Callable[[str, Any], str] = lambda reference, row: ""


def metrics_of(given: Any, settings: AnswerSettings) -> tuple[Metric, ...]:
    """The metrics that are named or given.

    Args:
        given: a name, a function ``(answer, row) -> bool | float``, an object with the ``compute`` of Hugging Face's
            ``evaluate``, or several in a list.
        settings: how answers are compared.

    Raises:
        ConfigError: one of them is none of these, two have one name, or a setting is used by none of them.
    """
    items = list(given) if isinstance(given, list | tuple) else [given]
    if not items:
        raise ConfigError("metric: none is given", field="metric")
    metrics = tuple(_metric(item, settings) for item in items)
    twice = next((name for name, count in Counter(metric.name for metric in metrics).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"metric: two of them are called {twice!r}", field="metric")
    _check_used(settings, metrics)
    return metrics


def generates(metrics: Iterable[Metric]) -> bool:
    """Whether answers are generated for one of them."""
    return any(metric.needs == "answers" for metric in metrics)


def _metric(given: Any, settings: AnswerSettings) -> Metric:
    if isinstance(given, str):
        table = _table(settings)
        if given not in table:
            hint = did_you_mean(given, METRICS) or f" There are: {', '.join(METRICS)}."
            raise ConfigError(f"metric: there is no {given!r:.40}.{hint}", field="metric")
        return table[given]
    compute = getattr(given, "compute", None)
    if callable(compute) and not isinstance(given, type):
        name = str(getattr(given, "name", None) or type(given).__name__)
        return Metric(name, "answers", partial(_computed, compute, name), is_share=None)
    if callable(given) and not isinstance(given, type):
        name = str(getattr(given, "__name__", None) or type(given).__name__)
        return Metric(
            name, "answers", lambda answer, reference, row: given(answer, row), needs_reference=False, is_share=None
        )
    expected = "a name, a function (answer, row) -> bool or float, or an object with compute(predictions, references)"
    raise ConfigError(f"metric must be {expected}, not {with_article(given)}", field="metric")


def _table(settings: AnswerSettings) -> Mapping[str, Metric]:
    """Name -> metric."""
    text = settings.text

    def compared(name: str, right: Callable[[str, str], bool]) -> Metric:
        return Metric(name, "answers", lambda answer, reference, row: right(text(answer), text(reference)))

    found = (
        compared("exact", lambda answer, reference: answer == reference),
        compared("contains", lambda answer, reference: reference in answer),
        compared("startswith", lambda answer, reference: answer.startswith(reference)),
        Metric(
            "regex",
            "answers",
            lambda answer, reference, row: bool(_compiled(_pattern(row, settings)).search(text(answer))),
            needs_reference=False,
            check=lambda reference, row: _why_no_pattern(row, settings),
        ),
        Metric(
            "number",
            "answers",
            lambda answer, reference, row: _same_number(answer, reference, settings.tolerance),
            check=lambda reference, row: "" if _number(reference) is not None else "its reference has no number",
        ),
        Metric(
            "json",
            "answers",
            lambda answer, reference, row: _right_fields(answer, reference, text),
            is_share=False,
            check=lambda reference, row: "" if _parsed(reference)[1] else "its reference is not JSON",
        ),
        Metric("json_valid", "answers", lambda answer, reference, row: _parsed(answer)[1], needs_reference=False),
        Metric("f1", "answers", lambda answer, reference, row: _f1(text(answer), text(reference)), is_share=False),
        Metric("choice", "options"),
        Metric("choice_norm", "options"),
        Metric("loss", "tokens", greater_is_better=False, is_share=False),
        Metric("perplexity", "tokens", greater_is_better=False, is_share=False, is_perplexity=True),
        Metric("accuracy", "classes"),
    )
    return {metric.name: metric for metric in found}


_USED_BY = {
    "strip": ("exact", "contains", "startswith", "regex", "json", "f1"),
    "casefold": ("exact", "contains", "startswith", "regex", "json", "f1"),
    "pattern": ("regex",),
    "tolerance": ("number",),
}
"""Setting -> the metrics that use it."""


def _check_used(settings: AnswerSettings, metrics: Sequence[Metric]) -> None:
    names, usual = {metric.name for metric in metrics}, AnswerSettings()
    for setting, users in _USED_BY.items():
        if getattr(settings, setting) != getattr(usual, setting) and names.isdisjoint(users):
            raise ConfigError(f"{setting} is used by {', '.join(users)}, and not by {', '.join(sorted(names))}")


def value_of(metric: Metric, answer: str, reference: str, row: Any, number: int) -> float | bool:
    """The value of one answer.

    Args:
        metric: a metric of answers.
        answer: the answer.
        reference: the reference; empty if the row has none.
        row: the row as it was given.
        number: its number, for the message.

    Raises:
        TrainingError: the metric fails, or returns something else than a number; names the row.
    """
    assert metric.value is not None
    try:
        value = metric.value(answer, reference, row)
    except Exception as error:  # a function of the user may raise anything
        reason = in_one_line(error)
        what = f"{type(error).__name__}: {reason:.200}" if reason else type(error).__name__
        raise TrainingError(f"metric {metric.name!r} fails at row {number}: {what}", index=number) from error
    value = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(value, bool | int | float) or (isinstance(value, float) and math.isnan(value)):
        what = "NaN" if isinstance(value, float) else f"{with_article(value)} ({value!r:.40})"
        raise TrainingError(f"metric {metric.name!r} returns {what} at row {number}, not a number", index=number)
    return value


def _computed(compute: Any, name: str, answer: str, reference: str, row: Any) -> Any:
    """The value of one item from an object with the call of ``evaluate``."""
    values = compute(predictions=[answer], references=[reference])
    if not isinstance(values, Mapping):
        return values
    numbers = {key: value for key, value in values.items() if isinstance(value, bool | int | float)}
    if name in values:
        return values[name]
    if len(numbers) != 1:
        raise ValueError(f"it returns {', '.join(map(str, values)) or 'nothing'}: expected one number, or {name!r}")
    return next(iter(numbers.values()))


def _compiled(pattern: str, error_class: type[Exception] = ValueError) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise error_class(f"pattern {pattern!r:.60} is not a regular expression: {in_one_line(error)}") from None


def _pattern(row: Any, settings: AnswerSettings) -> Any:
    if settings.pattern is not None:
        return settings.pattern
    return row.get(PATTERN) if isinstance(row, Mapping) else None


def _why_no_pattern(row: Any, settings: AnswerSettings) -> str:
    pattern = _pattern(row, settings)
    if not isinstance(pattern, str) or not pattern:
        return f"it has no {PATTERN!r} for the metric regex, and none is given for all rows (pattern=…)"
    try:
        _compiled(pattern)
    except ValueError as error:
        return str(error)
    return ""


def _number(text: str) -> float | None:
    """The last number of a text."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(answer: str, reference: str, tolerance: float) -> bool:
    given, wanted = _number(answer), _number(reference)
    return given is not None and wanted is not None and abs(given - wanted) <= tolerance * abs(wanted)


def _parsed(text: str) -> tuple[Any, bool]:
    """The value of a text as JSON, and whether it is JSON."""
    try:
        return json.loads(text), True
    except ValueError:
        return None, False


def _right_fields(answer: str, reference: str, text: Callable[[str], str]) -> float:
    """The share of the reference's fields, nested ones included, that the answer has with the same value."""
    given, valid = _parsed(answer)
    if not valid:
        return 0.0
    wanted, found = _fields(_parsed(reference)[0], text), _fields(given, text)
    right = sum(path in found and bool(found[path] == value) for path, value in wanted.items())
    return right / len(wanted)


def _fields(value: Any, text: Callable[[str], str], path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Path -> the value there, of everything that is neither an object nor a list with elements."""
    if isinstance(value, dict) and value:
        return {key: item for name, part in value.items() for key, item in _fields(part, text, (*path, name)).items()}
    if isinstance(value, list) and value:
        return {key: item for n, part in enumerate(value) for key, item in _fields(part, text, (*path, n)).items()}
    return {path: text(value) if isinstance(value, str) else (type(value) is bool, value)}


def _f1(answer: str, reference: str) -> float:
    """The F1 score of the words, separated by white space."""
    given, wanted = Counter(answer.split()), Counter(reference.split())
    if not given or not wanted:
        return float(given == wanted)
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total())
