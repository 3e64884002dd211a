"""Training on completions that are good or bad, each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset

import nbpeft
from nbpeft.errors import ConfigError, NbpeftError
from nbpeft.session import Session
from nbpeft.sweeps import sweep
from nbpeft.training.data import Collator
from nbpeft.training.objectives.collator import PairCollator, ShiftedCollator
from nbpeft.training.objectives.reference_cache import KnownLogProbs
from tests.closeness import assert_close
from tests.tiny_models import same_state
from tests.training.objectives.test_dpo import FIELDS, TOKENIZER, losses, new, plain_log_prob
from tests.training.objectives.trl_run import base_and_rows, filled
from tests.training.support import weights
from tests.training.trl_run import tiny_base

ROWS: list[dict[str, Any]] = base_and_rows("kto")[1]
THREE = ROWS[3:6]


def ratios(model: Any, rows: list[dict[str, str]]) -> torch.Tensor:
    """The log-probabilities of completions relative to the base, from plain forwards."""
    with torch.no_grad():
        policy = torch.stack([plain_log_prob(model, row, "completion") for row in rows])
        with model.disable_adapter():
            return policy - torch.stack([plain_log_prob(model, row, "completion") for row in rows])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_first_loss_is_that_of_log_probabilities_of_plain_forwards(beta: float) -> None:
    model, weight = filled(new()), {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    others = [{**row, "completion": THREE[place - 1]["completion"]} for place, row in enumerate(THREE)]
    found, kl = ratios(model, THREE), ratios(model, others).mean().clamp(min=0)
    expected = [
        1.5 * (1 - torch.sigmoid(beta * (ratio - kl))) if row["label"] else 0.5 * torch.sigmoid(beta * (ratio - kl))
        for ratio, row in zip(found, THREE, strict=True)
    ]
    fields = FIELDS | {"max_steps": 1, "train_sampling_strategy": "sequential", "beta": beta, **weight}
    result = nbpeft.train(model, THREE, reference="base", **fields)
    assert_close(losses(result), [float(sum(expected) / 3)])
    assert_close(result.state.series["kl"][0][1], float(kl))
    good = torch.stack([ratio for ratio, row in zip(found, THREE, strict=True) if row["label"]])
    assert_close(result.state.series["rewards/chosen"][0][1], beta * float(good.mean()))


def test_the_objective_follows_from_the_labels_which_the_result_says() -> None:
    result = nbpeft.train(new(), ROWS, **FIELDS)
    assert (result.objective, result.reference) == ("kto", "base") and losses(result)[0] == pytest.approx(0.5)
    assert "objective: kto, because the rows have labels of good and bad completions; reference: base" in result.message
    trained = nbpeft.train(filled(new()), ROWS, **FIELDS)
    assert trained.reference == "start" and losses(trained)[0] == pytest.approx(0.5)
    assert losses(trained)[-1] < 0.5
    named = [{"q": row["prompt"], "a": row["completion"], "v": "good" if row["label"] else "bad"} for row in ROWS]
    columns = {"prompt": "q", "completion": "a", "label": "v"}
    again = nbpeft.train(new(), named, columns=columns, **FIELDS)
    assert again.objective == "kto" and losses(again) == losses(result)
    numbers = Dataset.from_list([{**row, "label": int(row["label"])} for row in ROWS])
    coded = numbers.cast_column("label", ClassLabel(names=["bad", "good"]))
    assert losses(nbpeft.train(new(), coded, **FIELDS)) == losses(result)


def test_rows_that_are_all_good_are_learned_by_sft_unless_kto_is_named() -> None:
    good = [{**row, "label": True} for row in ROWS]
    assert nbpeft.train(new(), good, **FIELDS).objective == "sft"
    result = nbpeft.train(new(), good, good[:5], objective="kto", eval_steps=1, **FIELDS)
    assert result.objective == "kto" and "rewards/margins" not in result.state.series
    assert "eval_kl" in result.state.metrics and "eval_rewards/margins" not in result.state.metrics
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert nbpeft.train(new(), stream, objective="kto", **FIELDS).steps == 3


def test_an_evaluation_without_the_metric_is_not_the_best() -> None:
    fields = {"metric_for_best_model": "rewards/margins", "eval_strategy": "steps", "eval_steps": 1, "patience": 2}
    good = [{**row, "label": True} for row in ROWS[:4]]
    result = nbpeft.train(new(), ROWS, good, **fields, **FIELDS)
    assert result.steps == 3 and result.state.best_step is None and "eval_kl" in result.state.metrics


def test_curves_are_means_over_the_batches_that_have_a_value() -> None:
    rows = [{**ROWS[0], "label": True}] * 2 + [{**ROWS[1], "label": False}] * 2
    fields = FIELDS | {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    parts = nbpeft.train(new(), rows, gradient_accumulation_steps=2, **fields | {"max_steps": 1})
    whole = nbpeft.train(new(), rows, **fields | {"max_steps": 1, "per_device_train_batch_size": 4})
    for name in ("logps/chosen", "logps/rejected"):
        values = [run.state.series[name][0][1] for run in (parts, whole)]
        assert_close(values[0], values[1])


def test_a_last_batch_of_one_row_is_told() -> None:
    told = "the last batch of an epoch has one row, and its kl is estimated from this row itself"
    evaluated = nbpeft.train(new(), ROWS, ROWS[:5], per_device_eval_batch_size=4, **FIELDS | {"max_steps": 1}).message
    assert told.replace("an epoch", "an evaluation") in evaluated and told not in evaluated
    many = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert told in nbpeft.train(new(), ROWS[:5], objective="kto", **FIELDS | {"max_steps": 1} | many).message
    for count, size, drop in ((5, 4, False), (5, 4, True), (6, 4, False)):
        fields = {"per_device_train_batch_size": size, "dataloader_drop_last": drop}
        message = nbpeft.train(new(), ROWS[:count], objective="kto", **fields, **FIELDS | {"max_steps": 1}).message
        assert (told in message) is (count == 5 and not drop)


def test_the_prompt_of_a_row_is_followed_by_the_completion_before_it() -> None:
    collate = ShiftedCollator(PairCollator(Collator()), limit=4)
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "desirable": 1.0},
        {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7], "desirable": 0.0},
    ]
    batch = collate(rows)
    assert batch["rejected_input_ids"].tolist() == [[1, 2, 5, 6], [4, 3, 0, 0]]
    assert batch["rejected_labels"].tolist() == [[-100, -100, 5, 6], [-100, 3, -100, -100]]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]] and batch["desirable"].tolist() == [1, 0]


def test_labels_are_shown_as_they_are_trained_on_and_an_empty_one_is_left_out() -> None:
    session = Session()
    session.add(tiny_base(), {"r": 2, "target_modules": ["q_proj"]}, variable="model")
    shown = session.data(ROWS, TOKENIZER)
    assert (shown.summary.form, shown.summary.row_count, shown.notes) == ("prompt, completion and label", 12, ())
    result = nbpeft.train(new(), [*ROWS, {**ROWS[0], "label": None}], **FIELDS)
    assert "1 row left out: row 12: the label is empty" in result.message


def test_a_stopped_training_is_resumed_to_the_bit(tmp_path: Path) -> None:
    fields = FIELDS | {"max_steps": 4, "output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 2}
    through, first = filled(new()), filled(new())
    whole = nbpeft.train(through, ROWS, **fields)
    rest = nbpeft.train(first, ROWS, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"), **fields)
    assert losses(rest)[-2:] == losses(whole)[-2:] and same_state(weights(first), weights(through))


def test_the_adapters_of_a_sweep_have_the_losses_that_each_has_alone() -> None:
    result = nbpeft.train(new(), ROWS, **FIELDS | {"learning_rate": sweep(1e-2, 3e-2)})
    for member, rate in zip(result.members, (1e-2, 3e-2), strict=True):
        alone = nbpeft.train(new(), ROWS, **FIELDS | {"learning_rate": rate})
        assert_close([value for _, value in member.history], losses(alone))


@pytest.mark.slow
def test_two_processes_have_one_kl() -> None:
    fields = FIELDS | {"train_sampling_strategy": "sequential", "reference": "base"}
    result = nbpeft.train(filled(new()), ROWS, per_device_train_batch_size=2, processes=2, **fields)
    model = filled(new())
    parts = [ROWS[0:2], ROWS[2:4]]
    others = [{**row, "completion": part[place - 1]["completion"]} for part in parts for place, row in enumerate(part)]
    expected = ratios(model, others).mean().clamp(min=0)
    assert_close(result.state.series["kl"][0][1], float(expected))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "label": (
        {"data": [*ROWS, {**ROWS[0], "label": "so so"}], "objective": "kto"},
        "Row 12: 'label' is 'so so'; expected True or False, 1 or 0, 1 or -1, or 'good' or 'bad'.",
    ),
    "columns": (
        {"data": [{"question": "a", "answer": "b"}], "objective": "kto"},
        "Expected columns prompt, completion and label; found 'question', 'answer'.",
    ),
    "tokens": (
        {"data": [{"input_ids": [1, 2], "labels": [1, 2]}], "objective": "kto"},
        "rows of text with prompt, completion and label, not tokenized rows",
    ),
    "batch": ({"per_device_train_batch_size": 1}, "per_device_train_batch_size of at least 2"),
    "evaluation": ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size of at least 2"),
    "packing": ({"packing": True}, "packing cannot be combined with kto: "),
    "weight": ({"desirable_weight": -1.0}, "desirable_weight must be at least 0, not -1.0"),
    "beta": ({"beta": 0.0}, "beta must be greater than 0, not 0.0"),
    "field": ({"loss_type": "ipo"}, "'loss_type' is a field of dpo"),
    "row": ({"data": [{**row, "weight": 2} for row in ROWS]}, "the loss of kto does not support weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_one_line_before_the_first_step(case: str) -> None:
    given, message = WRONG[case]
    model = new()
    before = weights(model)
    with pytest.raises(NbpeftError) as refused:
        nbpeft.train(
            model, given.get("data", ROWS), **FIELDS, **{name: part for name, part in given.items() if name != "data"}
        )
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert same_state(weights(model), before)
    if case == "columns":
        assert isinstance(refused.value, NbpeftError) and not isinstance(refused.value, ConfigError)


def test_the_reference_of_a_completion_is_computed_in_one_epoch_and_that_of_the_others_in_each(
    computed: list[torch.Tensor], monkeypatch: Any
) -> None:
    fields = FIELDS | {"max_steps": 4, "per_device_train_batch_size": 3}
    model, plain = filled(new()), filled(new())
    result = nbpeft.train(model, ROWS[:6], reference="base", **fields)
    assert len(computed) == 2 * 2 + 2 * 1  # a step of the first epoch computes both halves
    monkeypatch.setattr(KnownLogProbs, "of", lambda *args: None)
    assert_close(losses(nbpeft.train(plain, ROWS[:6], reference="base", **fields)), losses(result))
