"""A manager whose adapters have all been taken out and put in again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import nn

from nbpeft.engine.lora_config import LoraConfig
from nbpeft.engine.manager import AdapterManager
from nbpeft.errors import AdapterError, TargetError
from tests.tiny_models import llama, same_state, state

KINDS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
]


def test_what_was_trainable_is_so_again_after_the_last_adapter_went_and_another_came() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    manager = AdapterManager.attach(model)
    config = LoraConfig(r=2, target_modules=["0"])
    for name in ("first", "second"):
        manager.add(name, config)
        assert not any(parameter.requires_grad for parameter in model[1].parameters())
        if name == "first":
            manager.remove(name)
    manager.unload(merge=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, True]


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
def test_an_adapter_gives_way_to_one_of_its_name_that_treats_a_module_otherwise(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    models = [llama(), llama()]
    managers = [AdapterManager.attach(model) for model in models]
    managers[0].add("a", LoraConfig(r=2, **first))
    for manager in managers:
        manager.add("a", LoraConfig(r=2, **second), replace=True)
    assert managers[0].layers.keys() == managers[1].layers.keys()
    assert managers[0].copies.keys() == managers[1].copies.keys()
    assert state(models[0]).keys() == state(models[1]).keys()
    if managers[0].copies or "modules_to_save" in first:
        with pytest.raises(TargetError):
            managers[0].plan(LoraConfig(r=2, **first), "another")
    managers[0].unload(merge=False)
    assert same_state(state(models[0]), state(llama()))


def test_a_module_with_adapters_inside_is_not_trained_as_a_whole() -> None:
    """Its copy would hold the adapters, and its file their tensors."""
    model = llama()
    manager = AdapterManager.attach(model)
    manager.add("a", LoraConfig(r=2, target_modules=["gate_proj"]))
    before = state(model)
    with pytest.raises(TargetError, match=r"mlp cannot be trained as a whole .*its gate_proj carries"):
        manager.add("b", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert same_state(state(model), before)


def test_an_adapter_inside_the_copy_of_another_acts_only_alone() -> None:
    """The copy would take the place of the layers it adapts, without a word."""
    model = llama()
    manager = AdapterManager.attach(model)
    manager.add("b", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))
    manager.add("a", LoraConfig(r=2, target_modules=["gate_proj"]))
    for name in "ba":
        manager.activate(name)
    for refused in (manager.activate, manager.merge, lambda names: manager.unload(merge=True, names=names)):
        with pytest.raises(AdapterError, match=r"'b' trained its own copy of .*mlp, inside of which 'a'"):
            refused(["a", "b"])
    assert manager.active == ("a",) and not manager.merged and manager.alive
