"""Rows held out by a share or a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import datasets
import pytest

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training import prepare_data, train
from nbpeft.training.data import groups_of, hold_out
from nbpeft.training.loop.rows import training_rows
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.training.support import token_rows, trainable

TEXTS = [{"text": f"row number {number}"} for number in range(50)]


def prepared(stream: bool = False) -> Any:
    data = datasets.Dataset.from_list(TEXTS)
    return prepare_data(data.to_iterable_dataset() if stream else data, CharTokenizer())


def keys(rows: Any) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in rows]


@pytest.mark.parametrize(("amount", "held"), [(0.1, 5), (0.97, 48), (0.001, 1), (2, 2), (49, 49)])
def test_a_split_is_disjoint_whole_and_reproducible(amount: float, held: int) -> None:
    rows = prepared()
    learn, measure, places = hold_out(rows, amount, seed=3)
    assert (len(learn), len(measure)) == (50 - held, held)
    assert places is not None and keys(measure) == [keys(rows)[place] for place in places]
    assert sorted(keys(learn) + keys(measure)) == sorted(keys(rows))
    again = hold_out(rows, amount, seed=3)
    assert [keys(part) for part in again[:2]] == [keys(learn), keys(measure)]


def test_another_seed_draws_others() -> None:
    rows = prepared()
    assert keys(hold_out(rows, 0.2, seed=3)[1]) != keys(hold_out(rows, 0.2, seed=4)[1])


@pytest.mark.parametrize("amount", [0, 1, 0.0, 1.0, -0.1, 1.5, -3, True, float("nan"), float("inf")])
def test_nonsense_is_refused(amount: Any) -> None:
    with pytest.raises(ConfigError, match=r"is neither data, nor a share of the rows between 0 and 1 \(0.1\), nor a"):
        train(trainable(), token_rows(), amount, max_steps=1)


@pytest.mark.parametrize("amount", [50, 64, 0.999])
def test_something_is_left_to_train_on(amount: Any) -> None:
    with pytest.raises(ConfigError, match="of 50 rows, which leaves nothing to train on"):
        hold_out(prepared(), amount, seed=0)


def test_a_stream_gives_its_first_rows() -> None:
    learn, measure, _ = hold_out(prepared(stream=True), 5, seed=0)
    assert keys(measure) == keys(prepared())[:5]
    assert keys(learn) == keys(prepared())[5:]
    with pytest.raises(ConfigError, match="a stream has no length to take a share of; give a number of rows"):
        hold_out(prepared(stream=True), 0.1, seed=0)
    with pytest.raises(TrainingError, match="holds out the whole stream"):
        hold_out(prepared(stream=True), 50, seed=0)


def test_a_training_evaluates_on_what_it_holds_out_and_says_how_many() -> None:
    result = train(trainable(), token_rows(20), 0.25, max_steps=2, seed=7)
    assert result.eval_loss is not None
    assert "5 of 20 rows held out for evaluation" in result.message
    same = train(trainable(), token_rows(20), 0.25, max_steps=2, seed=7)
    assert same.eval_loss == result.eval_loss
    tokenised = datasets.Dataset.from_list(token_rows(20))
    assert train(trainable(), tokenised, 5, max_steps=2, seed=7).eval_loss == result.eval_loss


GROUPED = [{"text": f"row {number}", "user": f"u{number % 7}"} for number in range(35)]


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize("amount", [0.3, 12])
def test_rows_of_a_group_are_held_out_together(make: Any, amount: Any) -> None:
    request = TrainRequest(trainable(), make(GROUPED), amount, tokenizer=CharTokenizer(), eval_by="user").opened()
    found = training_rows(request)
    users = [{int(number) % 7 for number in part.numbers} for part in (found.train, found.evaluation)]
    assert not users[0] & users[1] and len(found.train) + len(found.evaluation) == 35
    assert len(found.evaluation) == 10  # whole groups of 5 rows, and no more than was asked for
    assert found.held_out == "10 of 35 rows held out for evaluation, in whole groups by 'user' (7 groups)"
    assert found.notes == ()
    again = training_rows(request)
    assert keys(again.evaluation) == keys(found.evaluation)


def test_rows_without_a_group_are_groups_of_their_own() -> None:
    rows = [{"text": f"row {number}", "user": None if number % 2 else [1, number % 4]} for number in range(20)]
    groups = groups_of(prepare_data(rows, CharTokenizer()), rows, "user")
    assert groups is not None and len({*groups}) == 12 and groups[0] == groups[4] != groups[2]


def test_tokenised_rows_are_grouped_too() -> None:
    rows = [{"input_ids": [number + 1] * 3, "user": number % 2} for number in range(8)]
    found = training_rows(TrainRequest(trainable(), rows, 4, eval_by="user").opened())
    assert {row["input_ids"][0] % 2 for row in found.train} in ({0}, {1}) and len(found.evaluation) == 4
    assert found.notes == ()


def test_parts_of_a_row_are_held_out_together() -> None:
    rows = [{"text": letter * 30} for letter in "abcdefgh"]
    request = TrainRequest(trainable(), rows, 0.3, tokenizer=CharTokenizer(), max_length=10, long="split").opened()
    found = training_rows(request)
    assert not {row["input_ids"][1] for row in found.train} & {row["input_ids"][1] for row in found.evaluation}
    assert found.held_out == "8 of 32 rows held out for evaluation" and "split into 32 parts" in found.notes[0]


@pytest.mark.parametrize(
    ("data", "amount", "message"),
    [
        (GROUPED, None, r"eval_by groups the rows that are held out .* \(eval_data=0.1\)"),
        (GROUPED, 4, "each of the 7 groups has at least 5 rows, and eval_data holds out 4: hold out more rows"),
        ([{"text": "a", "user": 1}] * 4, 2, "all rows are one group, so that no group can be held out: pass eval_data"),
        ([{"text": "a", "usr": 1}] * 4, 2, "eval_by: row 0 has no 'user'; it has 'text', 'usr'. Did you mean 'usr'"),
        (datasets.Dataset.from_list(GROUPED).to_iterable_dataset(), 4, "eval_by needs all rows"),
    ],
)
def test_groups_that_cannot_be_drawn_are_one_line(data: Any, amount: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(trainable(), data, amount, tokenizer=CharTokenizer(), max_steps=1, eval_by="user")


def test_held_out_rows_that_are_also_trained_on_are_counted() -> None:
    rows = [{"Frage": f"q{number % 2}", "completion": "x"} for number in range(60)]
    request = TrainRequest(trainable(), rows, 0.2, tokenizer=CharTokenizer(), columns={"prompt": "Frage"})
    found = training_rows(request.opened())
    assert found.held_out == "12 of 60 rows held out for evaluation"
    assert found.notes[-1] == (
        "12 of the 12 held-out rows are also trained on (58 of 60 rows are repeats): "
        "eval_by='Frage' keeps equal rows together"
    )
    unlike = [{**row, "completion": str(number)} for number, row in enumerate(rows)]
    other = training_rows(
        TrainRequest(trainable(), unlike, 0.2, tokenizer=CharTokenizer(), columns={"prompt": "Frage"}).opened()
    )
    assert not any("also trained on" in note for note in other.notes)


@pytest.mark.parametrize("column", ["text", "messages", "input_ids"])
def test_the_suggested_grouping_keeps_equal_rows_apart_from_the_training(column: str) -> None:
    def cell(number: int) -> Any:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(number)}]
        return {"text": f"row {number}", "messages": turns, "input_ids": [number + 1, 2, 3]}[column]

    rows = [{column: cell(number % 6)} for number in range(24)]
    request = TrainRequest(
        trainable(), rows, 8, tokenizer=CharTokenizer("yes") if column == "messages" else CharTokenizer()
    )
    assert training_rows(request.opened()).notes[-1].endswith(f": eval_by={column!r} keeps equal rows together")
    grouped = training_rows(replace(request, eval_by=column).opened())
    assert not {*keys(grouped.train)} & {*keys(grouped.evaluation)} and len(grouped.evaluation) == 8
    assert not any("also trained on" in note for note in grouped.notes)


def test_the_result_has_the_numbers_of_the_held_out_rows() -> None:
    """Numbers of the data, though a row before them is left out, and the same where rows are split."""
    rows = [{"text": ""}, *TEXTS]
    found = training_rows(TrainRequest(trainable(), rows, eval_data=7, tokenizer=CharTokenizer()))
    (held,) = found.unlearned.values()
    texts = [CharTokenizer().decode(row["input_ids"], skip_special_tokens=True) for row in found.evaluation]
    assert held.total == 51 and texts == [rows[number]["text"] for number in held.numbers]
    request = TrainRequest(trainable(), TEXTS, eval_data=7, tokenizer=CharTokenizer(), max_length=9, long="split")
    (held,) = training_rows(request).unlearned.values()
    assert len(held.numbers) < 7 and held.total == 50


def test_the_numbers_of_streams_are_not_known_and_without_evaluation_there_are_none() -> None:
    stream = datasets.Dataset.from_list(TEXTS).to_iterable_dataset()
    request = TrainRequest(trainable(), stream, eval_data=7, tokenizer=CharTokenizer())
    assert training_rows(request).unlearned == {}
    without = training_rows(TrainRequest(trainable(), TEXTS, tokenizer=CharTokenizer())).unlearned
    assert without[""].numbers == () and without[""].total == 50


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_rows_of_tokens_have_numbers_too(make: Any) -> None:
    rows = token_rows()
    found = training_rows(TrainRequest(trainable(), make(rows), eval_data=5))
    assert [row["input_ids"] for row in found.evaluation] == [
        rows[number]["input_ids"] for number in found.unlearned[""].numbers
    ]
