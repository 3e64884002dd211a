from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training import Run, train
from nbpeft.training.data import check_rows
from tests.tiny_models import VOCABULARY
from tests.training.support import token_rows, trainable


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 999]}, "Row 1 has the token id 999, but the model knows ids from 0 to 96: tokenize"),
        ({"input_ids": [1, -1]}, "Row 1 has the token id -1"),
        ({"input_ids": [1, 2], "labels": [1]}, "Row 1 has 1 labels for 2 tokens."),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "Row 1 has an attention_mask of 1 for 2 tokens."),
        ({"input_ids": "abc"}, "Row 1: input_ids must be a list of token ids, not 'abc'."),
        ({"input_ids": []}, "Row 1: input_ids must be a list of token ids, not []."),
        ({"input_ids": [0.5]}, "Row 1: input_ids must be a list of token ids"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named_before_training(row: dict[str, Any], message: str) -> None:
    model = trainable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError) as failure:
        train(model, [{"input_ids": [1, 2, 3]}, row], max_steps=1)
    assert message in str(failure.value) and "\n" not in str(failure.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("row", [{"labels": [-100, -100, -100]}, {"attention_mask": [0, 0, 0]}])
def test_rows_without_any_label_to_learn_are_refused(row: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = [{"input_ids": [1, 2, 3], **row}] * 4
    with pytest.raises(
        TrainingError, match=r"^None of the 4 rows has a label to be learned: all are -100 or masked\.$"
    ):
        train(trainable(), rows, max_steps=1)
    train(trainable(), [*rows, {"input_ids": [1, 2, 3]}], max_steps=1, per_device_train_batch_size=5)


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_a_row_without_a_label_to_learn_is_left_out_and_named(kind: Any) -> None:
    good, empty = ({"input_ids": [1, 2, 3], "labels": labels} for labels in ([1, 2, 3], [7, -100, -100]))
    result = train(trainable(), kind([empty, good, empty, good]), max_steps=2, per_device_train_batch_size=1)
    assert "2 rows left out: rows 0, 2: nothing to learn" in result.message
    assert result.status == "finished" and math.isfinite(result.train_loss or math.nan)
    held = train(trainable(), kind([empty, *[good] * 4]), 2, max_steps=1)
    assert 0 not in held.held_out and len(held.held_out) == 2
    bad = {"input_ids": [1, 999], "labels": [1, 2]}
    with pytest.raises(TrainingError, match=r"^Row 2 has the token id 999"):
        train(trainable(), kind([empty, good, bad]), max_steps=1)


def test_rows_of_every_kind_that_can_be_learned_pass() -> None:
    check_rows([{"input_ids": np.array([1, 2])}, {"input_ids": torch.tensor([96])}], vocabulary=97, causal=True)
    check_rows([{"input_ids": [500], "labels": 1}], vocabulary=None, causal=False)
    check_rows(iter([{"input_ids": "?"}]), vocabulary=VOCABULARY, causal=True)
    check_rows([{"pixels": 1}], vocabulary=VOCABULARY, causal=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": "x"}, "max_steps must be a whole number, not 'x'"),
        ({"learning_rate": "abc"}, "learning_rate must be a number, not 'abc'"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, not -1.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size must be a whole number, not 2.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
        ({"seed": "a"}, "seed must be a whole number, not 'a'"),
        ({"report_to": "zzz"}, "zzz"),
        ({"callbacks": [3]}, "callbacks must be a list of TrainerCallbacks, not [3]"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1, not 0"),
        ({"tokenizer": [1]}, "tokenizer must be a tokenizer, not a list"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        train(trainable(), token_rows(), **({"max_steps": 1} | fields))
    assert message in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize("steps", [-5, 2.5, "x"])
def test_a_run_has_a_number_of_steps(steps: Any) -> None:
    with pytest.raises(ConfigError, match="total_steps must be a number of steps or None"):
        Run(trainable(), steps)
