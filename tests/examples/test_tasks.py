"""The tasks of the tutorials: the same rows each time, and nothing held out can be known from the training rows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest

from nbpeft import examples
from nbpeft.errors import ConfigError
from nbpeft.examples import Row

TASKS = [examples.order_codes, examples.dates, examples.filters, examples.records]


@pytest.mark.parametrize("task", TASKS)
def test_rows(task: Callable[..., tuple[list[Row], list[Row]]]) -> None:
    train, held_out = task(200, 40, seed=5)
    assert (len(train), len(held_out)) == (200, 40)
    assert all(row.keys() == {"prompt", "completion"} and row["completion"].startswith(" ") for row in train)
    prompts = [row["prompt"] for row in (*train, *held_out)]
    assert len(set(prompts)) == len(prompts), "no row twice, none both learned and held out"
    assert task(200, 40, seed=5) == (train, held_out)
    assert task(200, 40, seed=6)[0] != train


@pytest.mark.parametrize("task", TASKS)
def test_the_help_of_a_task_has_its_sections_at_the_margin(task: Callable[..., object]) -> None:
    """Whether the compiler removes the indentation of docstrings (since Python 3.13) or does not."""
    assert {"Args:", "Returns:"} <= {*(inspect.getdoc(task) or "").splitlines()}


def test_every_code_is_learned_and_no_held_out_pair() -> None:
    train, held_out = examples.order_codes()

    def codes(rows: list[Row]) -> list[tuple[str, str]]:
        found = [re.fullmatch(r" ([A-Z]{2}\d\d)-\d{1,2}-([A-Z]\d)", row["completion"]) for row in rows]
        return [(match[1], match[2]) for match in found if match]

    learned, asked = codes(train), codes(held_out)
    assert len(learned) == len(train) and len(asked) == len(held_out)
    assert not set(learned) & set(asked), "the pairs are new"
    for place in (0, 1):
        assert {pair[place] for pair in asked} <= {pair[place] for pair in learned}, "their codes are not"


def test_records_and_dates_hold_what_the_text_says() -> None:
    train, held_out = examples.records(200, 40)
    words = 0
    for row in (*train, *held_out):
        record = dict(part.split(": ") for part in row["completion"].strip().split(" | "))
        assert list(record) == ["name", "city", "item", "count"]
        assert all(record[key] in row["prompt"] for key in ("name", "city", "item"))
        words += not re.search(rf"\b{record['count']}\b", row["prompt"])
    assert 60 < words < 130, "about four counts in ten are written in words"
    train, held_out = examples.dates(50, 10)
    assert all(re.fullmatch(r" \d{4}-\d\d-\d\d", row["completion"]) for row in (*train, *held_out))
    years = [{int(row["completion"][1:5]) for row in rows} for rows in (train, held_out)]
    assert not years[0] & years[1]


@pytest.mark.parametrize(("number", "text"), [(2, "two"), (17, "seventeen"), (40, "forty"), (59, "fifty-nine")])
def test_counts_in_words(number: int, text: str) -> None:
    rows = examples.records(3000, 0)[0]
    asked = [row["prompt"].lower() for row in rows if row["completion"].endswith(f"count: {number}")]
    assert any(re.search(rf"(?<![\w-]){text} ", prompt) for prompt in asked)


@pytest.mark.parametrize("task", [examples.filters, examples.records])
def test_no_held_out_name_or_city_is_trained_on(task: Callable[..., tuple[list[Row], list[Row]]]) -> None:
    def names(rows: list[Row]) -> set[str]:
        return set(re.findall(r"\b(?:name|city)(?: =|:) (\w+)", "".join(row["completion"] for row in rows)))

    train, held_out = task(300, 40)
    assert names(train) and names(held_out) and not names(train) & names(held_out)


def test_prompted() -> None:
    train, held_out = examples.order_codes(10, 2)
    rows = examples.prompted(held_out, train, 3)
    assert [row["completion"] for row in rows] == [row["completion"] for row in held_out]
    for row, plain in zip(rows, held_out, strict=True):
        assert row["prompt"].endswith("\n\n" + plain["prompt"])
        assert row["prompt"].count("Order:") == 4
        assert all(example["prompt"] + example["completion"] in row["prompt"] for example in train[:3])
    assert examples.prompted(held_out, train, 0) == held_out
    with pytest.raises(ConfigError, match="shots=11: there are 10 examples"):
        examples.prompted(held_out, train, 11)


@pytest.mark.parametrize("number", [-1, 10_000, "3", 2.5])
def test_impossible_numbers_of_rows(number: object) -> None:
    with pytest.raises(ConfigError, match="train must be a number of rows from 0 to 5,000"):
        examples.order_codes(number)  # type: ignore[arg-type]
