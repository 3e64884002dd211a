"""The objectives that compare two completions without a reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nbpeft
from nbpeft.errors import ConfigError, NbpeftError
from tests.closeness import assert_close
from tests.training.objectives.test_dpo import FIELDS, TOKENIZER, losses, new
from tests.training.objectives.trl_run import ROWS, filled

TWO = [ROWS[4], ROWS[9]]


def sums(model: Any, row: dict[str, str], name: str) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """Log-probability and number of tokens of a completion and of its prompt, from a plain forward."""
    prompt, completion = (TOKENIZER(row[key])["input_ids"] for key in ("prompt", name))
    ids = torch.tensor([[*prompt, *completion, TOKENIZER.eos_token_id]])
    found = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1).gather(-1, ids[0, 1:, None])[:, 0]
    start = len(prompt) - 1
    return found[start:].sum(), len(completion) + 1, found[:start].sum(), start


def expected(model: Any, objective: str, beta: float, **fields: Any) -> float:
    with torch.no_grad():
        chosen, rejected = ([sums(model, row, name) for row in TWO] for name in ("chosen", "rejected"))
    whole = torch.stack([one[0] - other[0] for one, other in zip(chosen, rejected, strict=True)])
    mean = torch.stack([one[0] / one[1] - other[0] / other[1] for one, other in zip(chosen, rejected, strict=True)])
    nll = -sum(part[0] for part in chosen) / sum(part[1] for part in chosen)
    if objective == "cpo":
        return float(F.softplus(-beta * whole).mean() + nll)
    if objective == "simpo":
        return float(F.softplus(fields["simpo_gamma"] - beta * mean).mean())
    odds = [torch.stack([p[0] / p[1] - torch.log1p(-(p[0] / p[1]).exp()) for p in part]) for part in (chosen, rejected)]
    both = -sum(part[0] + part[2] for part in chosen) / sum(part[1] + part[3] for part in chosen)
    return float(both + beta * F.softplus(odds[1] - odds[0]).mean())


@pytest.mark.parametrize(
    ("objective", "fields"),
    [("cpo", {"beta": 0.4}), ("simpo", {"beta": 2.0, "simpo_gamma": 0.3}), ("orpo", {"beta": 0.4})],
)
def test_the_first_loss_is_that_of_log_probabilities_of_plain_forwards(objective: str, fields: dict[str, Any]) -> None:
    model = filled(new())
    wanted = expected(model, objective, **fields)
    result = nbpeft.train(model, TWO, objective=objective, **FIELDS | {"max_steps": 1}, **fields)
    assert_close(losses(result), [wanted])
    assert (result.objective, result.reference) == (objective, None)
    assert f"objective: {objective} (" in result.message and "reference" not in result.message


@pytest.mark.parametrize("objective", ["cpo", "simpo", "orpo"])
def test_the_loss_falls_and_the_margin_of_the_rewards_grows(objective: str) -> None:
    result = nbpeft.train(new(), ROWS, ROWS[:4], objective=objective, **FIELDS | {"max_steps": 9})
    first, last = (result.state.series["rewards/margins"][place][1] for place in (0, -1))
    assert losses(result)[-1] < losses(result)[0] and last > first
    assert set(result.state.metrics) == {"eval_rewards/accuracies", "eval_rewards/margins"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a reference": ({"objective": "orpo", "reference": "base"}, "objective='orpo' uses no reference: remove it"),
    "a field of others": ({"simpo_gamma": 0.2}, "'simpo_gamma' is a field of simpo, cpo, but the objective is dpo"),
    "no gamma": ({"objective": "cpo", "simpo_gamma": 0.2}, "loss_type='sigmoid' has no simpo_gamma; 'simpo' has one"),
    "another loss": ({"objective": "simpo", "loss_type": "ipo"}, "loss_type must be one of simpo, not 'ipo'"),
    "alpha": ({"objective": "cpo", "cpo_alpha": -1.0}, "cpo_alpha must be at least 0"),
    "smoothing": ({"objective": "cpo", "loss_type": "ipo", "label_smoothing": 0.1}, "has no label_smoothing"),
    "beta": ({"objective": "orpo", "beta": -1.0}, "beta must be at least 0, not -1.0"),
    "packing": ({"objective": "cpo", "packing": True}, "packing cannot be combined with cpo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_is_one_line_before_the_first_step(case: str) -> None:
    given, told = WRONG[case]
    with pytest.raises(NbpeftError) as caught:
        nbpeft.train(new(), ROWS, **FIELDS | given)
    assert isinstance(caught.value, ConfigError) and told in str(caught.value) and "\n" not in str(caught.value)
