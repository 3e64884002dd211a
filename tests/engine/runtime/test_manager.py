"""The manager: ``use`` puts back what was; adapters come again; what activate and scale refuse."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import AdapterError, AdapterExistsError, StaleModelError, TargetError, UnknownAdapterError
from tests.closeness import differ
from tests.tiny_models import llama, same_state, state

INPUTS = torch.linspace(-1, 1, 12).view(3, 4)


def adapted(*names: str) -> AdapterManager:
    torch.manual_seed(0)
    manager = AdapterManager.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    for name in names:
        manager.add(name, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    return manager


def output(manager: AdapterManager) -> Tensor:
    with torch.no_grad():
        result: Tensor = manager.model(INPUTS)
    return result


def test_what_was_merged_is_merged_again_bit_for_bit() -> None:
    manager = adapted("a", "b")
    manager.merge()
    merged = output(manager)
    with pytest.warns(UserWarning, match="unmerging"), manager.use("b"):
        assert not manager.merged
        assert not torch.equal(output(manager), merged)
    assert (manager.merged, manager.active) == (("a",), ("a",))
    assert torch.equal(output(manager), merged)
    manager.unmerge()


def test_adapters_renamed_or_deleted_inside_a_block() -> None:
    manager = adapted("a", "b", "c")
    manager.activate(["a", "c"])
    manager.disable()
    with manager.use("b"):
        manager.rename("a", "z")
        assert manager.enabled
    assert (manager.active, manager.enabled) == (("z", "c"), False)
    with manager.use("b"):
        manager.remove("c")
    assert (manager.active, manager.enabled) == (("z",), False)


def test_a_name_that_another_adapter_has_is_refused() -> None:
    manager = adapted("a", "b")
    kept = {name: manager.weights(name) for name in manager.names}
    for name in ("b", "a"):
        with pytest.raises(AdapterExistsError, match=f"name '{name}' already exists"):
            manager.rename("a", name)
    assert manager.names == ("a", "b")
    for name, weights in kept.items():
        assert same_state(weights.adapters, manager.weights(name).adapters)


def test_a_config_of_no_adapter_is_asked_for_in_one_line() -> None:
    manager = adapted("sql")
    with pytest.raises(UnknownAdapterError, match=r"^Adapter 'sgl' not found; the model has: 'sql'\. .*'sql'\?$"):
        manager.configs["sgl"]
    configs = manager.configs
    assert copy.deepcopy(configs).keys() == {"sql"} and pickle.loads(pickle.dumps(configs)).keys() == {"sql"}
    manager.unload(merge=False)
    with pytest.raises(UnknownAdapterError, match="has: none"):
        manager.configs["sql"]


def test_none_are_active_again_where_none_were() -> None:
    manager = adapted()
    base = output(manager)
    manager.add("a", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), select=False)
    with manager.use("a"):
        assert not torch.equal(output(manager), base)
    assert manager.active == ()
    assert torch.equal(output(manager), base)
    assert not any(parameter.requires_grad for parameter in manager.parameters("a"))


@pytest.mark.parametrize("names", [None, 3, [["a"]]])
def test_what_is_no_name_is_refused_in_one_line(names: Any) -> None:
    manager = adapted("a")
    for command in (manager.activate, *((manager.merge,) if names is not None else ())):
        with pytest.raises(AdapterError, match="expected the name of an adapter or a list of names, not"):
            command(names)
    assert (manager.active, manager.merged) == (("a",), ())


@pytest.mark.parametrize("scale", [math.nan, math.inf, "much", None, [1.0]])
def test_a_scale_that_is_no_finite_number_is_refused(scale: Any) -> None:
    manager = adapted("a")
    before = output(manager)
    with pytest.raises(AdapterError, match="the scale of adapter 'a' must be a finite number"):
        manager.set_scale("a", scale)
    assert torch.equal(output(manager), before)


KINDS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
]


def test_what_was_trainable_is_so_again_after_the_last_adapter() -> None:
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
def test_replacing_an_adapter_by_one_of_another_kind(first: dict[str, Any], second: dict[str, Any]) -> None:
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


def trains(manager: AdapterManager, name: str) -> bool:
    return all(parameter.requires_grad for parameter in manager.parameters(name))


def test_adapters_that_are_off_train_only_in_blocks_that_use_them() -> None:
    manager = adapted("a", "b")
    manager.disable()
    assert not any(parameter.requires_grad for parameter in manager.model.parameters())
    manager.activate("b")
    assert not trains(manager, "b")
    with manager.use("a"):
        assert trains(manager, "a")
        manager.disable()
        assert not trains(manager, "a")
    assert not trains(manager, "a")
    manager.freeze("b")
    manager.enable()
    assert not trains(manager, "b") and not trains(manager, "a"), "what was frozen stays so"
    manager.unfreeze("b")
    manager.disable()
    manager.merge()
    assert trains(manager, "b"), "merging turns them on"


def test_a_module_with_adapters_inside_is_not_trained_as_a_whole() -> None:
    """Its copy would hold the adapters, and its file their tensors."""
    model = llama()
    manager = AdapterManager.attach(model)
    manager.add("a", LoraConfig(r=2, target_modules=["gate_proj"]))
    before = state(model)
    with pytest.raises(TargetError, match=r"mlp cannot be trained as a whole .*its gate_proj has adapters"):
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
        with pytest.raises(AdapterError, match=r"'b' trained its own copy of .*mlp and 'a' adapts layers inside"):
            refused(["a", "b"])
    assert manager.active == ("a",) and not manager.merged and manager.alive


def test_what_takes_an_adapters_place_is_at_its_trained_strength() -> None:
    manager = adapted("a")
    manager.set_scale("a", 0.25)
    manager.add("a", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), replace=True)
    assert manager.scale("a") == 1.0


def test_a_copy_is_as_strong_on_every_layer() -> None:
    manager = adapted("a")
    manager.layers["0"].set_scale("a", 3.0)
    manager.set_scale("a", 0.5)
    before = output(manager)
    manager.copy("a", "b")
    manager.activate("b")
    assert torch.equal(output(manager), before)


def test_those_that_are_still_there_are_active_again() -> None:
    manager = adapted("a", "b")
    manager.select_again(["gone", "b"])
    assert manager.active == ("b",)
    manager.select_again(["gone"])
    assert manager.active == ("b",)


def test_unmerging_what_is_not_merged_or_not_there_is_told() -> None:
    manager = adapted("a")
    with pytest.warns(UserWarning, match="Already unmerged"):
        manager.unmerge()
    manager.unload(merge=False)
    with pytest.raises(StaleModelError, match="can no longer be used"):
        manager.unmerge()


def test_a_deletion_is_told_once() -> None:
    manager = adapted("a")
    manager.add("b", LoraConfig(r=2, target_modules=["1"]))
    told: list[tuple[str, ...]] = []
    unsubscribe = manager.subscribe(lambda: told.append(tuple(manager.layers)))
    manager.remove("b")
    assert tuple(manager.layers) == ("0",) and told == [("0",)]
    unsubscribe()


def test_another_one_is_activated_in_the_place_of_what_is_merged() -> None:
    manager = adapted("a", "b")
    expected = output(manager)
    manager.merge()
    with pytest.warns(UserWarning, match="adapters are merged: unmerging before another is activated"):
        manager.activate("b")
    assert (manager.merged, manager.active) == ((), ("b",))
    assert differ(output(manager), expected)
    manager.activate("a")
    assert torch.equal(output(manager), expected)
