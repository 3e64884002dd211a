"""Every keyword of a training is in the record of its run, and is taken over by a resumed one or named."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from nbpeft.training import Trainer, train
from nbpeft.training.disk.kept_arguments import is_plain_value, missing_for_losses, plain, to_keep, to_take_over
from nbpeft.training.request import GIVEN_AGAIN, NOT_KEPT, TrainRequest
from tests.training.support import token_rows, trainable


class MyTrainer(Trainer):
    pass


class MyArguments(TrainingArguments):
    pass


GIVEN: dict[str, Any] = {
    "max_length": 11,
    "columns": {"prompt": "question"},
    "separator": ";",
    "skip_bad": True,
    "learn": "last",
    "reasoning": "mask",
    "long": "drop",
    "chat_template_kwargs": {"enable_thinking": False},
    "eval_by": "user",
    "patience": 3,
    "sample": ["Who?"],
    "every": 2,
    "score": GIVEN_AGAIN,
    "metric": "f1",
    "max_score_rows": 5,
    "max_new_tokens": 7,
    "packing": True,
    "track": "tensorboard",
    "eval_data": 0.25,
    "trainer_class": MyTrainer,
    "arguments_class": MyArguments,
    "processes": 2,
    "hosts": ["localhost"],
    "halving": True,
    "stop_on_divergence": False,
    "objective": "dpo",
    "reference": "base",
    "reward": [abs],
}
"""A value that says something for each keyword of ``train``."""


def test_every_keyword_of_a_training_is_kept_or_given_again() -> None:
    keywords = set(inspect.signature(train).parameters)
    assert keywords == set(GIVEN) | NOT_KEPT - {"is_open", "objective_reason", "rate_reason", "first_random"}
    assert TrainRequest(trainable(), token_rows(), tokenizer=object(), adapter="a", replace=True).kept() == {}
    assert TrainRequest(trainable(), token_rows(), **GIVEN).kept() == GIVEN


def test_a_request_has_the_defaults_of_a_training() -> None:
    usual = {name: item.default for name, item in inspect.signature(train).parameters.items()}
    made = {item.name: item.default for item in dataclasses.fields(TrainRequest)}
    assert made.keys() == usual.keys() | {"is_open", "objective_reason", "rate_reason", "first_random"}
    optional = usual.keys() - {"model", "data", "arguments"}
    assert {name: made[name] for name in optional} == {name: usual[name] for name in optional}


def test_a_run_keeps_them_as_plain_values(tmp_path: Path) -> None:
    given: dict[str, Any] = {"patience": 2, "eval_data": 4, "max_length": 9, "learning_rate": np.float64(0.5)}
    given |= {"lr_scheduler_type": SchedulerType.COSINE, "output_dir": tmp_path / "out", "trainer_class": MyTrainer}
    train(trainable(), token_rows(), run_dir=tmp_path / "runs", max_steps=1, save_total_limit=2, **given)
    facts = json.loads((tmp_path / "runs/default-1/run.json").read_text())
    wanted: dict[str, Any] = {"patience": 2, "eval_data": 4, "max_length": 9, "learning_rate": 0.5, "max_steps": 1}
    wanted |= {"lr_scheduler_type": "cosine", "output_dir": str(tmp_path / "out"), "save_total_limit": 2}
    assert wanted.items() <= facts["arguments"].items()
    assert facts["objects"] == ["trainer_class"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a/b"), os.path.join("a", "b")),
        (SchedulerType.COSINE, "cosine"),
        (np.float64(0.5), 0.5),
        (np.int32(3), 3),
        (np.bool_(True), True),
        ((1, {"a": (2,)}), [1, {"a": [2]}]),
        ({"b", "a"}, ["a", "b"]),
        (None, None),
    ],
)
def test_values_that_say_the_same(value: Any, expected: Any) -> None:
    found = plain(value)
    assert found == expected and type(found) is type(expected) and is_plain_value(found)
    assert to_keep({"x": value, "y": print}) == ({"x": expected}, ["y"])


@pytest.mark.parametrize(
    "name",
    [
        "output_dir",
        "push_to_hub",
        "hub_model_id",
        "report_to",
        "hosts",
        "run_dir",
        "adapter",
        "trainer_class",
        "ctx",
    ],
)
def test_what_acts_outside_of_the_training_is_not_taken_over(name: str) -> None:
    assert to_take_over({name: "x", "seed": 3}) == ({"seed": 3}, {name: "x"})


def test_no_more_processes_than_the_machine_has() -> None:
    most = os.cpu_count() or 1
    for name in ("processes", "dataloader_num_workers"):
        assert to_take_over({name: most}) == ({name: most}, {})
        assert to_take_over({name: 256 * most}) == ({}, {name: 256 * most})
        assert to_take_over({name: "2"}) == ({}, {name: "2"})
    assert missing_for_losses({"processes": 256, "output_dir": "x"}) == ["processes"]


@pytest.mark.parametrize("kept", [None, [], "x", 3, [["a", 1]]])
def test_what_is_no_record_says_nothing(kept: Any) -> None:
    assert to_take_over(kept) == ({}, {})


def test_rows_are_not_read_from_where_a_record_says() -> None:
    assert to_take_over({"eval_data": "/etc/passwd"}) == ({}, {"eval_data": "/etc/passwd"})
    assert to_take_over({"eval_data": 0.2}) == ({"eval_data": 0.2}, {})
