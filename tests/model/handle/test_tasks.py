"""Handles for tasks: their forwards name the inputs that PEFT's do, by which a Trainer keeps columns."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import pytest
import torch

import nbpeft
from tests.tiny_models import adapted, same_state, tokens

TASKS = (
    *("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
    "FeatureExtraction",
)


@pytest.mark.parametrize("task", TASKS)
def test_inputs_are_those_of_peft(task: str) -> None:
    ours, theirs = (
        [(name, item.kind, item.default) for name, item in inspect.signature(kind.forward).parameters.items()]
        for kind in (getattr(nbpeft, f"PeftModelFor{task}"), getattr(peft, f"PeftModelFor{task}"))
    )
    assert ours == theirs


def test_inputs_go_by_place_or_name() -> None:
    model, ids = adapted(task_type="CAUSAL_LM").eval(), tokens()
    mask: Any = torch.ones_like(ids)
    with torch.no_grad():
        by_name = model(input_ids=ids, attention_mask=mask, labels=ids)
        by_place = model(ids, mask, None, ids)
    assert same_state({"": by_name.logits}, {"": by_place.logits}) and by_name.loss == by_place.loss
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="takes 8 inputs by position, not 9"):
        model(*[None] * 9)


@pytest.mark.parametrize("library", [nbpeft, peft])
@pytest.mark.parametrize("of_handle", [True, False])
def test_a_model_that_has_adapters_already_is_warned_of(library: Any, of_handle: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    handle = library.get_peft_model(model, library.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="You are trying to modify a model"):
        library.get_peft_model(handle if of_handle else model, library.LoraConfig(target_modules="(.*[.])?1"))
