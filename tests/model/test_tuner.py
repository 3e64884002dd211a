"""What a handle's ``base_model`` tells and does, as peft's tuner."""

from __future__ import annotations

from typing import Any

import peft
import pytest

import nbpeft
from tests.tiny_models import llama, tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
)
def test_targeted_modules_are_named_as_in_peft(changes: dict[str, Any]) -> None:
    names = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(**changes))
        model.add_adapter("other", library.LoraConfig(target_modules=["up_proj", "q_proj"]))
        names.append(model.targeted_module_names)
    assert names[0] == names[1] == list(dict.fromkeys(names[0]))


def test_reentrant_checkpointing_is_prepared_as_in_peft() -> None:
    for library in (nbpeft, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.train()
        model.prepare_model_for_gradient_checkpointing(model)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(input_ids=tokens()).logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
