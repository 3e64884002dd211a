"""The base model's own state dict under adapters, and injection by the keys of one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import BaseMismatchError, MergeError, TargetError
from nbpeft.model import (
    LoraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from tests.tiny_models import adapted, classifier, config, llama, logits, state


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_keeps_its_keys_and_tensors(tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    before = state(base)
    for target, saved in ((["q_proj", "embed_tokens"], ["lm_head"]), (["v_proj"], None)):
        model = get_peft_model(copy.deepcopy(base), config(target_modules=target, modules_to_save=saved))
        model.add_adapter("base_layer", config())
        own = get_base_model_state_dict(model)
        assert own.keys() == before.keys() and all(torch.equal(own[key], before[key]) for key in before)
        assert get_base_model_state_dict(model.get_base_model()).keys() == before.keys()


def test_base_weights_are_loaded_under_their_own_keys() -> None:
    model, other = adapted(), llama(seed=9)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert peft.get_base_model_state_dict(theirs).keys() == get_base_model_state_dict(model).keys()
    assert set_base_model_state_dict(model, other.state_dict()) == ([], [])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(other))
    partial = {"model.norm.weight": torch.full((32,), 2.0), "nonsense": torch.ones(1)}
    result = set_base_model_state_dict(model, partial, strict=False)
    assert result.unexpected_keys == ["nonsense"] and "lm_head.weight" in result.missing_keys
    assert model.get_submodule("base_model.model.model.norm").weight[0] == 2


def test_base_weights_that_do_not_fit_change_nothing() -> None:
    model = adapted()
    before, own = state(model), get_base_model_state_dict(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({key: value for key, value in own.items() if key != "lm_head.weight"}, r"Missing key\(s\): 'lm_head.weight'"),
        (
            {**own, "lm_haed.weight": own["lm_head.weight"]},
            r"Unexpected key\(s\): 'lm_haed.weight'.* Did you mean 'lm_head.weight'",
        ),
        ({**own, "lm_head.weight": torch.zeros(3, 3)}, r"lm_head.weight is \(3, 3\), expected \(97, 32\)"),
    ]
    for tensors, message in wrong:
        with pytest.raises(BaseMismatchError, match=message):
            set_base_model_state_dict(model, {key: torch.zeros_like(value) for key, value in tensors.items()})
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge before loading base weights"):
        set_base_model_state_dict(model, own)


def test_without_a_handle_keys_have_no_prefix() -> None:
    changes: dict[str, Any] = {"modules_to_save": ["score"]}
    base = inject_adapter_in_model(config(**changes), classifier())
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **changes), classifier()
    )
    tensors = get_peft_model_state_dict(base)
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    again = inject_adapter_in_model(config(**changes), classifier())
    assert set_peft_model_state_dict(again, tensors).missing_keys == []
    assert torch.equal(logits(again), logits(base))


def test_injection_by_the_keys_of_a_state_dict() -> None:
    some = [f"model.layers.{layer}.self_attn.{name}" for layer, name in ((0, "q_proj"), (1, "o_proj"))]
    donor = inject_adapter_in_model(config(target_modules=some), llama())
    tensors = get_peft_model_state_dict(donor)
    keys = [tensors, {f"base_model.model.{key}": value for key, value in tensors.items()}]
    keys.append({f"_orig_mod.{key}": value for key, value in tensors.items()})
    for given in keys:
        base = llama()
        torch.manual_seed(5)
        with pytest.warns(RuntimeWarning, match="select different modules .*o_proj.* and 1 more"):
            model = inject_adapter_in_model(config(), base, state_dict=given)
        manager = manager_of(model)
        assert manager is not None and list(manager.layers) == some
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), llama(), state_dict=tensors
    )
    assert peft.get_peft_model_state_dict(theirs).keys() == get_peft_model_state_dict(model).keys()
    assert not torch.equal(logits(model), logits(donor)), "the values are not used"
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model), logits(donor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_adapter_in_model(config(target_modules=some), llama(), state_dict=tensors)


def test_a_config_that_selects_the_modules_of_the_keys_is_left_as_it_is() -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*1\.self_attn\.v_proj"}
    tensors = get_peft_model_state_dict(inject_adapter_in_model(config(**fields), llama()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Any = inject_adapter_in_model(config(**fields), llama(), state_dict=tensors)
    assert len(tensors) == 2 * 3 and get_peft_model_state_dict(model).keys() == tensors.keys()
    own = model.peft_config["default"]
    assert (own.target_modules, own.exclude_modules) == ({"q_proj", "v_proj"}, fields["exclude_modules"])


LINEAR = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        (LoraConfig(**LINEAR, init_lora_weights=False), "lora_A"),
        (LoraConfig(**LINEAR, init_lora_weights=False), ""),
        (LoraConfig(**LINEAR, init_lora_weights=False, use_dora=True), "lora_magnitude_vector"),
        (LoraConfig(**LINEAR, init_lora_weights=False, use_dora=True), ""),
        (nbpeft.IA3Config(**LINEAR, feedforward_modules=[], init_ia3_weights=False), ""),
    ],
)
def test_what_a_state_dict_lacks_adds_nothing_where_it_had_no_values(given: Any, lacking: str) -> None:
    """PEFT computes with memory that nobody has written then."""
    layer = "model.layers.1.self_attn.v_proj"
    tensors = get_peft_model_state_dict(inject_adapter_in_model(given, llama()))
    some = {key: value for key, value in tensors.items() if not key.startswith(f"{layer}.{lacking}")}
    model = inject_adapter_in_model(given, llama(), low_cpu_mem_usage=True)
    lacks = set_peft_model_state_dict(model, some)
    assert len(lacks.missing_keys) == len(tensors) - len(some) > 0
    if lacking:
        assert torch.equal(model.state_dict()[f"{layer}.lora_B.default.weight"], tensors[f"{layer}.lora_B.weight"])
    if lacking != "lora_magnitude_vector":  # there the factors act, and the weight keeps its norm
        rows = torch.randn(2, 32)
        assert torch.equal(model.get_submodule(layer)(rows), llama().get_submodule(layer)(rows))
    set_peft_model_state_dict(model, {key: value for key, value in tensors.items() if key not in some})
    assert all(torch.equal(value, tensors[key]) for key, value in get_peft_model_state_dict(model).items())


@pytest.mark.filterwarnings("ignore:Adapter other was active")
def test_a_config_can_be_taken_out_after_its_layers_were() -> None:
    """As libraries undo a load that failed."""
    model: Any = inject_adapter_in_model(config(), llama())
    inject_adapter_in_model(config(), model, "other")
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            module.delete_adapter("other")
    own = model.peft_config
    assert "other" not in own and own.pop("other").r == 4 and own.pop("other", None) is None
    with pytest.raises(KeyError):
        own.pop("other")
    with pytest.raises(KeyError):
        del own["nobody"]
    manager_of(model).remove("default")
    del own["default"]
    assert not own


def test_a_state_dict_that_names_nothing_changes_nothing() -> None:
    base = llama()
    before = state(base)
    for given in ({}, {"x.weight": torch.ones(1)}, {"x.lora_A.weight": torch.ones(1)}):
        with pytest.raises(TargetError):
            inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base, state_dict=given)
    assert state(base).keys() == before.keys() and manager_of(base) is None
