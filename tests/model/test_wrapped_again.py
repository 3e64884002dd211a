"""A handle where a base model is expected, and other states in which a user's next line must still be right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from nbpeft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from nbpeft.errors import ConfigError, StaleModelError, UnknownAdapterError, UnknownMethodError
from nbpeft.model import get_peft_config, get_peft_model_state_dict, inject_adapter_in_model
from tests.closeness import assert_close
from tests.tiny_models import adapted, config, llama, logits, same_state, state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted(llama()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_loading_onto_a_handle_adds_to_its_base(saved: Path) -> None:
    first = PeftModel.from_pretrained(llama(), saved)
    expected = logits(first)
    second = PeftModel.from_pretrained(first, saved, adapter_name="two")
    assert not isinstance(second.get_base_model(), PeftModel)
    assert list(second.peft_config) == ["default", "two"]
    assert torch.equal(logits(second), expected)
    with pytest.raises(StaleModelError):
        first.set_adapter("default")


def test_a_handle_of_a_handle_reconfigures_its_base(tmp_path: Path) -> None:
    first = adapted(llama())
    second = PeftModel(first, config(r=3), "default")
    assert second.peft_config["default"].r == 3
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(second))
    assert not any("base_model.model.base_model" in key for key in get_peft_model_state_dict(second))


COMMANDS_OF_A_DEAD_HANDLE: dict[str, Callable[[Any], Any]] = {
    "card": lambda old: old.create_or_update_model_card("unused"),
    "set_adapter": lambda old: old.base_model.set_adapter("x"),
    "set_requires_grad": lambda old: old.base_model.set_requires_grad("x"),
    "enable": lambda old: old.base_model.enable_adapter_layers(),
    "disable": lambda old: old.base_model.disable_adapter_layers(),
    "disable through the handle": lambda old: old.disable_adapter_layers(),
    "delete": lambda old: old.base_model.delete_adapter("x"),
    "combine": lambda old: old.base_model.add_weighted_adapter(["x"], [1.0], "y"),
    "merge": lambda old: old.base_model.merge_adapter(),
    "unmerge": lambda old: old.base_model.unmerge_adapter(),
    "merge and unload": lambda old: old.base_model.merge_and_unload(),
    "unload": lambda old: old.base_model.unload(),
}


@pytest.mark.parametrize("command", COMMANDS_OF_A_DEAD_HANDLE)
def test_no_command_of_a_handle_works_once_another_has_the_base(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = adapted()
    old.add_adapter("x", config())
    new = PeftModel(old, config(), "third")
    before = state(new), new.active_adapter, new.manager.revision
    with pytest.raises(StaleModelError, match="another PeftModel"):
        COMMANDS_OF_A_DEAD_HANDLE[command](old)
    assert same_state(before[0], state(new)) and before[1:] == (new.active_adapter, new.manager.revision)
    assert not list(tmp_path.iterdir())
    new.base_model.set_adapter("x")
    assert copy.deepcopy(new).base_model.set_adapter("default") is None


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_copied_module_train_in_the_copy_alone(bias: str, tmp_path: Path) -> None:
    def model_of(library: Any) -> Any:
        torch.manual_seed(0)
        base = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 2)})
        fields = {"target_modules": ["body"], "modules_to_save": ["head"], "bias": bias}
        return library(base, fields)

    ours = model_of(lambda base, fields: get_peft_model(base, LoraConfig(**fields)))
    theirs = model_of(lambda base, fields: peft.get_peft_model(base, peft.LoraConfig(**fields)))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "original_module" in name)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = model_of(lambda base, _: PeftModel.from_pretrained(base, tmp_path))
    assert torch.equal(loaded.base_model.model["head"].modules_to_save["default"].weight, theirs.head.weight)


def test_names_below_a_handle_are_those_of_its_base() -> None:
    model = get_peft_model(llama(), config())
    path = "model.layers.1.self_attn.o_proj"
    below: dict[str, Any] = {"modules_to_save": ["base_model.model.lm_head"]}
    below["rank_pattern"] = {f"base_model.model.{path}": 2}
    for targets in (f"base_model.model.{path}", [f"base_model.model.{path}"]):
        given = config(target_modules=targets, **below)
        with pytest.warns(UserWarning, match="You are trying to modify a model"):
            again: Any = get_peft_model(model, given)
        assert [*again.manager.layers] == [path] and [*again.manager.copies] == ["lm_head"]
        assert again.peft_config["default"] is given and given.rank_pattern == {path: 2}
        model = again


def test_merging_turns_adapters_on_that_were_off() -> None:
    model = adapted(llama())
    on = logits(model)
    model.base_model.disable_adapter_layers()
    assert not get_model_status(model).enabled
    model.merge_adapter()
    assert get_model_status(model).enabled and all(layer.enabled for layer in get_layer_status(model))
    assert_close(logits(model), on)
    model.unmerge_adapter()
    assert torch.equal(logits(model), on)


def test_errors_are_those_that_code_for_peft_catches(saved: Path) -> None:
    model = adapted(llama())
    for error in (KeyError, ValueError):
        with pytest.raises(error, match="Adapter 'zz' not found"):
            get_peft_model_state_dict(model, adapter_name="zz")
        with pytest.raises(error):
            get_peft_config({"peft_type": "NOPE"})
    assert str(UnknownAdapterError("in a line")) == str(UnknownMethodError("in a line")) == "in a line"
    with pytest.raises(ConfigError, match="config must be a config such as LoraConfig"):
        PeftModel.from_pretrained(llama(), saved, config={"r": 3})  # type: ignore[arg-type]
    model.delete_adapter("default")
    with pytest.raises(KeyError, match="no adapter is active"):
        _ = model.active_peft_config


def test_the_base_model_carries_the_configs_while_it_is_adapted(tmp_path: Path) -> None:
    injected = inject_adapter_in_model(config(), llama())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), llama())
    assert isinstance(injected.peft_config, dict) and isinstance(theirs.peft_config, dict)
    assert list(injected.peft_config) == list(theirs.peft_config) == ["default"]
    model = adapted()
    base = model.get_base_model()
    assert base.peft_config == model.peft_config and base.peft_config["default"].r == config().r
    model.add_adapter("other", config(r=2))
    model.manager.rename("other", "renamed")
    assert list(base.peft_config) == ["default", "renamed"]
    twin = copy.deepcopy(model)
    twin.delete_adapter("renamed")
    assert list(twin.get_base_model().peft_config) == ["default"] and len(base.peft_config) == 2
    model.delete_adapter("default")
    assert list(base.peft_config) == ["renamed"]
    bare = model.merge_and_unload()
    assert bare is base and not hasattr(base, "peft_config")
    base.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    injected_twin = twin.unload()
    assert not hasattr(injected_twin, "peft_config")


def test_injecting_twice_under_one_name_replaces_with_a_warning() -> None:
    model: Any = inject_adapter_in_model(config(r=2, init_lora_weights=False), llama())
    with pytest.warns(UserWarning, match="already has an adapter 'default': a new one replaces it$"):
        inject_adapter_in_model(config(r=3, init_lora_weights=True), model)
    assert {key.shape[0] for name, key in model.state_dict().items() if "lora_A" in name} == {3}
    assert torch.equal(logits(model.eval()), logits(llama()))


@pytest.mark.parametrize("way", ["inject", "read"])
def test_what_replaces_an_adapter_says_so_at_the_line_that_did_it(way: str, saved: Path) -> None:
    base = llama()
    adapted(base).manager.unsaved.add("default")
    with pytest.warns(UserWarning, match="already has an adapter 'default'.*; its unsaved weights") as caught:
        if way == "inject":
            inject_adapter_in_model(config(), base)
        else:
            PeftModel.from_pretrained(base, saved)
    assert [one.filename for one in caught if "replaces it" in str(one.message)] == [__file__]
