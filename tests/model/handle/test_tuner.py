"""What a handle's ``base_model`` tells and does, as peft's tuner."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.errors import TargetError, UnknownAdapterError
from tests.tiny_models import adapted, llama, logits, tokens


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


@pytest.mark.parametrize("tied", [True, False])
def test_modules_tied_to_the_embedding_are_pefts(tied: bool) -> None:
    found = [
        library.get_peft_model(llama(tie_word_embeddings=tied), library.LoraConfig(target_modules=["q_proj"]))
        for library in (peft, nbpeft)
    ]
    theirs, ours = (model._get_module_names_tied_with_embedding() for model in found)
    assert ours == theirs == (["lm_head"] if tied else [])


def test_a_model_names_its_usual_targets_and_makes_an_adapter_anew() -> None:
    model = adapted()
    tuner: Any = model.base_model
    assert set(tuner.target_module_mapping["llama"]) == set(peft.LoraModel.target_module_mapping["llama"])
    assert tuner.targeted_parameter_names == []
    tuner.inject_adapter(tuner.model, "default", low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in tuner.manager.parameters("default"))
    with pytest.raises(UnknownAdapterError, match="nobody"):
        tuner.inject_adapter(tuner.model, "nobody")
