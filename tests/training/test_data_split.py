"""Rows held out by a share or a number."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training import prepare_data, train
from nbpeft.training.data import hold_out
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
    learn, measure = hold_out(rows, amount, seed=3)
    assert (len(learn), len(measure)) == (50 - held, held)
    assert sorted(keys(learn) + keys(measure)) == sorted(keys(rows))
    again = hold_out(rows, amount, seed=3)
    assert [keys(part) for part in again] == [keys(learn), keys(measure)]


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
    learn, measure = hold_out(prepared(stream=True), 5, seed=0)
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
