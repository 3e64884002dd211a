"""What a handle's ``base_model`` tells and does, as peft's tuner."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.errors import TargetError
from tests.tiny_models import llama, logits, tokens


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


def test_a_tuner_adapts_a_model_without_a_handle_as_in_peft() -> None:
    found = []
    for library in (nbpeft, peft):
        torch.manual_seed(1)
        config = library.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        tuner = library.LoraModel(llama(), config, "sql").eval()
        assert type(tuner).__name__ == "LoraModel" and list(tuner.peft_config) == ["sql"]
        found.append((logits(tuner.model), [name for name, _ in tuner.named_parameters() if "lora_" in name]))
        tuner.merge_and_unload()
    assert found[0][1] == found[1][1] and found[0][1]
    assert torch.equal(found[0][0], found[1][0])


def test_a_tuner_that_cannot_be_made_leaves_the_model() -> None:
    model = llama()
    with pytest.raises(TargetError):
        nbpeft.LoraModel(model, nbpeft.LoraConfig(target_modules=["nothing"]), "sql")
    assert not any("lora_" in name for name, _ in model.named_parameters())
