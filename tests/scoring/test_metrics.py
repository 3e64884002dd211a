"""The metrics of answers, and what is refused before anything is answered."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.names import METRICS
from nbpeft.scoring.metrics import AnswerSettings, metrics_of, value_of

CASES: list[tuple[str, dict[str, Any], str, str, float]] = [
    ("exact", {}, "Paris", "Paris", 1),
    ("exact", {}, " Paris", "Paris", 0),
    ("exact", {"strip": True}, " Paris\n", "Paris", 1),
    ("exact", {}, "paris", "Paris", 0),
    ("exact", {"casefold": True}, "STRASSE", "straße", 1),
    ("contains", {}, "It is Paris.", "Paris", 1),
    ("contains", {}, "It is paris.", "Paris", 0),
    ("startswith", {}, "Paris, of course", "Paris", 1),
    ("startswith", {}, "It is Paris", "Paris", 0),
    ("regex", {"pattern": r"\d{4}"}, "in 1998", "", 1),
    ("regex", {"pattern": r"^\d{4}$"}, "in 1998", "", 0),
    ("number", {}, "10 - 3 makes 7.", "#### 7", 1),
    ("number", {}, "1,234.50", "1234.5", 1),
    ("number", {}, "about 101", "100", 0),
    ("number", {"tolerance": 0.02}, "about 101", "100", 1),
    ("number", {}, "none", "100", 0),
    ("number", {}, "-2e-3", "-0.002", 1),
    ("json", {}, '{"a": 1, "b": {"c": [1, 2]}}', '{"b": {"c": [1, 3]}, "a": 1}', 2 / 3),
    ("json", {}, "not JSON", '{"a": 1}', 0),
    ("json", {}, '{"a": true}', '{"a": 1}', 0),
    ("json", {"strip": True}, '{"a": "x "}', '{"a": "x"}', 1),
    ("json_valid", {}, '{"a": 1}', "", 1),
    ("json_valid", {}, "{'a': 1}", "", 0),
    ("f1", {}, "the cat sat", "the cat", 0.8),
    ("f1", {}, "", "the cat", 0),
]


@pytest.mark.parametrize(("name", "settings", "answer", "reference", "value"), CASES)
def test_answers_are_compared_as_the_metric_says(
    name: str, settings: dict[str, Any], answer: str, reference: str, value: float
) -> None:
    given = AnswerSettings(**settings)
    (metric,) = metrics_of(name, given)
    assert metric.check(reference, {}) == ""
    assert value_of(metric, answer, reference, {}, 0) == pytest.approx(value)


def test_every_name_is_a_metric() -> None:
    assert [metric.name for metric in metrics_of(list(METRICS), AnswerSettings(strip=True))] == list(METRICS)


def test_a_pattern_may_be_that_of_the_row() -> None:
    (metric,) = metrics_of("regex", AnswerSettings())
    assert value_of(metric, "abc", "", {"pattern": "b"}, 0) is True
    assert "has no 'pattern'" in metric.check("", {})
    assert "is not a regular expression" in metric.check("", {"pattern": "("})


class Rouge:
    """An object with the call of ``evaluate``."""

    name = "rouge1"

    def compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
        assert len(predictions) == len(references) == 1
        return {"rouge1": float(predictions == references), "other": 0.5}


def test_functions_and_objects_of_evaluate_are_metrics() -> None:
    def length(answer: str, row: Any) -> int:
        return len(answer) + row["more"]

    own, rouge = metrics_of([length, Rouge()], AnswerSettings())
    assert value_of(own, "abc", "", {"more": 2}, 0) == 5
    assert value_of(rouge, "a", "a", {}, 0) == 1.0
    assert (own.needs_reference, rouge.needs_reference) == (False, True)
    assert (own.name, rouge.name) == ("length", "rouge1")


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ("exakt", {}, "there is no 'exakt'. Did you mean 'exact'"),
        ("bleu2000", {}, "There are: exact"),
        ([], {}, "none is given"),
        (3, {}, "not an int"),
        (str, {}, "not a type"),
        (["exact", "exact"], {}, "two of them are called 'exact'"),
        ("loss", {"strip": True}, "strip is used by exact, contains"),
        ("exact", {"pattern": "x"}, "pattern is used by regex, and not by exact"),
        ("exact", {"tolerance": 0.1}, "tolerance is used by number"),
        ("regex", {"pattern": "("}, "is not a regular expression"),
        ("number", {"tolerance": -1}, "tolerance must be a number of at least 0"),
    ],
)
def test_what_is_no_metric_or_not_used_is_refused(given: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        metrics_of(given, AnswerSettings(**settings))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (ZeroDivisionError("by zero"), "metric 'own' fails at row 7: ZeroDivisionError: by zero"),
        (None, "returns None"),
        (float("nan"), "returns NaN at row 7"),
        ("good", r"returns a str \('good'\) at row 7, not a number"),
    ],
)
def test_what_a_function_does_wrong_names_the_row(returned: Any, message: str) -> None:
    def own(answer: str, row: Any) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    (metric,) = metrics_of(own, AnswerSettings())
    with pytest.raises(TrainingError, match=message):
        value_of(metric, "", "", {}, 7)
