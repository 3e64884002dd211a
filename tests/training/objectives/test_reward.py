"""Reward models: the logit of a classifier with one label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForSequenceClassification

import nbpeft
from nbpeft.errors import NbpeftError
from nbpeft.session import Session
from tests.closeness import assert_close
from tests.tiny_models import same_state
from tests.training.objectives.test_dpo import FIELDS, TOKENIZER, losses, new
from tests.training.objectives.trl_run import ROWS, filled
from tests.training.support import trainable, weights
from tests.training.trl_run import tiny_base


def classifier(labels: int = 1) -> Any:
    base = tiny_base(LlamaForSequenceClassification)
    if labels != 1:
        config = base.config
        config.num_labels = labels
        base = LlamaForSequenceClassification(config)
    return trainable(base, task_type="SEQ_CLS")


def reward(model: Any, row: dict[str, Any], name: str) -> torch.Tensor:
    ids = [*TOKENIZER(row["prompt"] + row[name])["input_ids"], TOKENIZER.eos_token_id]
    return model(input_ids=torch.tensor([ids])).logits[0, 0].double()


@pytest.mark.parametrize("margin", [None, 0.7])
def test_the_first_loss_is_that_of_the_rewards_of_plain_forwards(margin: float | None) -> None:
    model = filled(classifier())
    rows = [row if margin is None else {**row, "margin": margin} for row in ROWS[:3]]
    with torch.no_grad():
        pairs = [[reward(model, row, name) for name in ("chosen", "rejected")] for row in rows]
    expected = [F.softplus((margin or 0.0) - one + other) + 0.1 * (one + other) ** 2 for one, other in pairs]
    result = nbpeft.train(model, rows, center_rewards_coefficient=0.1, **FIELDS | {"max_steps": 1})
    assert_close(losses(result), [float(sum(expected) / 3)])
    assert (result.objective, result.reference) == ("reward", None)
    told = (
        "objective: reward (center_rewards_coefficient=0.1), because the rows have chosen and rejected, and the model"
    )
    assert told in result.message and "margin" not in result.message


def test_rewards_of_chosen_completions_become_greater() -> None:
    result = nbpeft.train(classifier(), ROWS, ROWS, **FIELDS | {"max_steps": 20})
    assert result.state.metrics["eval_rewards/accuracies"] > 0.9 and losses(result)[-1] < losses(result)[0]
    assert "logps/chosen" not in result.state.series


def test_both_completions_are_shown_for_a_reward_model() -> None:
    session = Session()
    base = tiny_base(LlamaForSequenceClassification)
    session.add(base, {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, variable="model")
    shown = session.data(ROWS, TOKENIZER).summary
    assert (shown.form, shown.has_labels, shown.rows[0].target_title) == ("chosen and rejected", False, "rejected")


def test_a_margin_is_named_where_it_is_not_used() -> None:
    result = nbpeft.train(new(), [{**row, "margin": 1.0} for row in ROWS], **FIELDS)
    assert "columns not used: 'margin'" in result.message


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "causal": (new, {"objective": "reward"}, "with num_labels=1; LlamaForCausalLM is not one"),
    "two labels": (lambda: classifier(2), {"objective": "reward"}, "LlamaForSequenceClassification has 2"),
    "margin": (
        classifier,
        {"data": [{**ROWS[0], "margin": "much"}]},
        "Row 0: 'margin' is a str ('much'), not a finite",
    ),
    "center": (classifier, {"center_rewards_coefficient": -1.0}, "center_rewards_coefficient must be at least 0"),
    "beta": (classifier, {"beta": 0.1}, "'beta' is a field of dpo, orpo, simpo, cpo"),
    "reference": (classifier, {"reference": "base"}, "objective='reward' uses no reference"),
    "rows": (
        classifier,
        {"data": [{"text": "w1", "label": 0.5}], "objective": "reward"},
        "Expected columns chosen and rejected (and prompt); found 'text', 'label'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_is_one_line_before_the_first_step(case: str) -> None:
    make, given, told = WRONG[case]
    model = make()
    before = weights(model)
    with pytest.raises(NbpeftError) as caught:
        nbpeft.train(model, given.get("data", ROWS), **FIELDS | {key: given[key] for key in given if key != "data"})
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert same_state(weights(model), before)
