"""Mixtures of data: rows of several sources in given shares."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from nbpeft.errors import ConfigError, NbpeftError
from nbpeft.training import summarize, train
from nbpeft.training.data import Mixture, mixture, open_data
from nbpeft.training.loop.rows import training_rows
from nbpeft.training.objectives.kto import Kto
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.training.support import trainable

MANY = [{"text": f"a{number}"} for number in range(30)]
FEW = [{"text": f"b{number}"} for number in range(9)]


def counts(rows: Any) -> Counter[str]:
    return Counter(row["text"][0] for row in rows)


def test_rows_are_drawn_once_each_in_their_shares() -> None:
    rows = open_data(mixture((MANY, 0.7), (FEW, 0.3)))
    assert counts(rows) == {"a": 21, "b": 9} and len({row["text"] for row in rows}) == 30
    assert rows.note == "mixture: 21 of 30 rows of part 0, 9 of 9 rows of part 1"
    assert counts(open_data(mixture((MANY, 2), (FEW, 2)))) == {"a": 9, "b": 9}
    assert open_data(rows) is rows
    order = [row["text"][0] for row in rows]
    assert order != sorted(order)  # mixed, not one part after the other


def test_the_seed_draws_the_rows_and_files_are_parts(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in FEW))
    mixed = mixture((datasets.Dataset.from_list(MANY), 0.7), (str(tmp_path / "few.jsonl"), 0.3))
    first, again, other = (open_data(mixed, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and counts(first) == {"a": 21, "b": 9}
    request = TrainRequest(trainable(), mixed, 0.2, tokenizer=CharTokenizer(), arguments={"seed": 1})
    opened = request.opened()
    assert opened.data == first
    measured = TrainRequest(trainable(), FEW, mixed, tokenizer=CharTokenizer(), arguments={"seed": 1}).opened()
    assert measured.eval_data == first
    found = training_rows(opened)
    assert len(found.evaluation) == 6 and found.notes[0].startswith("mixture: 21 of 30 rows of part 0, 9 of 9 rows of ")
    assert summarize(mixed, CharTokenizer()).unused[0] == found.notes[0]


def test_a_training_says_what_it_was_mixed_from() -> None:
    mixed = mixture(many=(MANY, 1), few=(FEW, 1))
    result = train(trainable(), mixed, tokenizer=CharTokenizer(), max_steps=1)
    assert "mixture: 9 of 30 rows of many, 9 of 9 rows of few" in result.message


STREAM = datasets.Dataset.from_list(FEW).to_iterable_dataset()
WRONG: dict[str, tuple[Any, str]] = {
    "one": (lambda: mixture((MANY, 1)), "a mixture has at least two parts"),
    "pair": (lambda: mixture(MANY, FEW), "a part of a mixture is (rows or where they are, share)"),
    "share": (lambda: mixture((MANY, 0), (FEW, 1)), "the share of part 0 must be a number greater than 0, not 0"),
    "nan": (lambda: mixture((MANY, 1), (FEW, float("nan"))), "the share of part 1 must be a number greater than 0"),
    "mixture": (lambda: mixture((MANY, 1), (Mixture(()), 1)), "part 1 of a mixture is a Mixture, not rows"),
    "stream": (lambda: open_data(mixture((MANY, 1), (STREAM, 1))), "part 1 of the mixture is a stream"),
    "file": (lambda: open_data(mixture((MANY, 1), ("none.jsonl", 1))), "There is no file 'none.jsonl'"),
    "forms": (
        lambda: open_data(mixture((MANY, 1), ([{"prompt": "a", "completion": "b"}], 1))),
        "the parts of a mixture must have the same form of rows: part 0 has text, part 1 has prompt and completion",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_mixed_is_one_line(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(NbpeftError) as refused:
        make()
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert isinstance(refused.value, ConfigError) or case == "file"


def labelled(names: list[str], label: Any) -> datasets.Dataset:
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": str(number), "label": label} for number in (1, 2)])
    return rows.cast_column("label", datasets.ClassLabel(names=names))


def test_numbered_labels_keep_the_names_that_their_dataset_has() -> None:
    good, bad = labelled(["good", "bad"], 0), labelled(["good", "bad"], 1)
    request = TrainRequest(trainable(), mixture((good, 1), (bad, 1)), tokenizer=CharTokenizer(), objective=Kto())
    assert [row["desirable"] for row in training_rows(request).train] == [
        float(row["label"] == 0) for row in request.opened().data
    ]
    words = [{"prompt": "a", "completion": "b", "label": "bad"}]
    assert len(open_data(mixture((good, 2), (words, 1)))) == 3
    for other in (labelled(["bad", "good"], 1), [{"prompt": "a", "completion": "b", "label": 1}]):
        with pytest.raises(ConfigError, match="the numbers in 'label' are not the same classes in all parts"):
            open_data(mixture((good, 1), (other, 1)))


def test_a_separator_is_for_the_parts_that_are_tables_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;b\na,b;2\n")
    rows = open_data(mixture((tmp_path / "a.csv", 1), ([{"text": "c"}], 1)), ";")
    assert sorted(row["text"] for row in rows) == ["a,b", "c"]
