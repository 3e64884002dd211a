"""Fields that a training does not use are named before its first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import TrainingArguments

from nbpeft.training import train
from nbpeft.training.transformers.arguments import build_arguments
from nbpeft.training.transformers.unused_fields import _RULES, Beside, unused_fields
from tests.training.support import token_rows, trainable


def named(beside: Beside | None = None, **fields: Any) -> str:
    settings = build_arguments(fields, TrainingArguments, folder="x", evaluates=beside is not None and beside.evaluates)
    return unused_fields(fields, settings, beside or Beside())


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"do_train": True}, "do_train (a training always trains, and evaluates eval_data)"),
        ({"max_steps": 2, "num_train_epochs": 5}, "num_train_epochs (max_steps is given)"),
        ({"eval_steps": 5, "eval_delay": 1}, "eval_steps, eval_delay (there are no evaluation rows)"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model (nothing is evaluated or scored)"),
        ({"logging_strategy": "epoch", "logging_steps": 5}, "logging_steps (logging_strategy is not 'steps')"),
        ({"save_total_limit": 2}, "save_total_limit (save_strategy is 'no')"),
        ({"save_steps": 2}, "save_steps (save_strategy is not 'steps')"),
        ({"hub_model_id": "me/a"}, "hub_model_id (push_to_hub is not given)"),
        ({"run_name": "a"}, "run_name (nothing is reported to a tracker)"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            "warmup_steps (lr_scheduler_type 'constant' has no warmup)",
        ),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "gradient_checkpointing_kwargs (gradient_check"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules (only the optimizers galore and apollo take it)"),
        ({"ignore_data_skip": True}, "ignore_data_skip (resume_from_checkpoint is not given)"),
        ({"ddp_bucket_cap_mb": 5}, "ddp_bucket_cap_mb (one process trains)"),
        ({"do_eval": True, "run_name": "a"}, "do_eval (a training always trains, and evaluates eval_data); run_name ("),
    ],
)
def test_a_field_without_effect_is_named_with_the_reason(fields: dict[str, Any], line: str) -> None:
    assert named(**fields).startswith(f"not used: {line}")


def test_fields_with_an_effect_are_not_named() -> None:
    assert named(learning_rate=1e-3, max_steps=-1, num_train_epochs=2, weight_decay=0.1, do_eval=False) == ""
    assert named(Beside(evaluates=True), eval_steps=5, per_device_eval_batch_size=2, metric_for_best_model="loss") == ""
    assert named(Beside(evaluates=True), eval_strategy="epoch", eval_steps=5).endswith("(eval_strategy is not 'steps')")
    assert named(Beside(scores=True), metric_for_best_model="exact") == ""
    assert named(Beside(tracks=True), run_name="a", project="b") == ""
    assert named(Beside(processes=True), ddp_bucket_cap_mb=5) == ""
    assert named(save_strategy="steps", save_steps=5, output_dir="x") == ""


def test_the_names_are_those_of_fields() -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    former = {"warmup_ratio", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"}
    assert {name for names, _, _ in _RULES for name in names} <= known | former


def test_a_run_tells_which_fields_it_does_not_use() -> None:
    result = train(trainable(), token_rows(), max_steps=1, num_train_epochs=5, do_train=True)
    assert (
        "not used: do_train (a training always trains, and evaluates eval_data); num_train_epochs (max"
        in result.message
    )
