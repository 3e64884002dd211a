"""The small functions of PEFT's utilities give what PEFT's give."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.engine.contract.registry import methods
from tests import tiny_models
from tests.closeness import assert_close

peft = pytest.importorskip("peft")


def both(path: str, name: str) -> list[Any]:
    """PEFT's function and ours."""
    return [getattr(importlib.import_module(f"{library}.{path}"), name) for library in ("peft", "nbpeft")]


def same(results: list[Any]) -> bool:
    theirs, ours = results
    return torch.equal(theirs, ours) if isinstance(theirs, torch.Tensor) else theirs == ours


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("infer_device", ()),
        ("shift_tokens_right", (torch.tensor([[5, 6, -100], [7, -100, 8]]), 0, 1)),
        ("transpose", (torch.arange(6.0).reshape(2, 3), True)),
        ("transpose", (torch.arange(6.0).reshape(2, 3), False)),
        ("str_to_bool", ("Yes",)),
        ("str_to_bool", ("off",)),
        ("get_pattern_key", (["k_proj", "layers.1.*"], "model.layers.1.q_proj")),
        ("get_pattern_key", (["k_proj"], "model.k_proj_2")),
        ("_get_batch_size", (torch.zeros(3, 2), None)),
        ("_get_batch_size", (None, torch.zeros(4, 2, 5))),
        ("_is_valid_match", ("model.q_proj", "q_proj")),
        ("_is_valid_match", ("model.q_proj", "proj")),
        ("_is_valid_match", ("q_proj", "q_proj")),
    ],
)
def test_a_function_gives_what_pefts_gives(name: str, arguments: tuple[Any, ...]) -> None:
    assert same([function(*arguments) for function in both("utils.other", name)])


def test_names_of_adapters_are_put_into_keys() -> None:
    keys = ["a.lora_A.weight", "a.lora_magnitude_vector", "lora_B.base.weight", "a.score.weight"]
    tensors = {key: torch.tensor(place) for place, key in enumerate(keys)}
    theirs, ours = (
        function(tensors, "sql", "lora_")
        for function in both("utils.save_and_load", "_insert_adapter_name_into_state_dict")
    )
    assert ours == theirs and "a.lora_A.sql.weight" in ours


def test_a_transposed_parameter_stays_one() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    assert all(type(function(weight, True)) is nn.Parameter for function in both("utils.other", "transpose"))


def test_wrong_arguments_are_refused_as_by_peft() -> None:
    for name, arguments in (
        ("shift_tokens_right", (torch.zeros(1, 2), None, 0)),
        ("str_to_bool", ("maybe",)),
        ("_get_batch_size", (None, None)),
    ):
        for function in both("utils.other", name):
            with pytest.raises(ValueError, match=r"."):
                function(*arguments)


def test_tensors_that_share_their_storage_are_known() -> None:
    weight = torch.zeros(4, 4)
    theirs, ours = both("utils.other", "id_tensor_storage")
    assert ours(weight) == ours(weight[0]) == theirs(weight) != ours(weight.clone())


def test_the_parts_of_a_path() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    for function in both("utils", "_get_submodules"):
        assert function(model, "0.0") == (model[0], model[0][0], "0")
        assert function(model, "0") == (model, model[0], "0")


def test_the_input_embedding_is_found() -> None:
    model = tiny_models.llama()
    for function in both("utils", "_get_input_embeddings_name"):
        assert function(model) == "model.embed_tokens"
        assert function(nn.Linear(2, 2), "none") == "none"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.1\..*_proj"},
        {"target_modules": ["q_proj", "mlp.up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["lm_head", "up_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_targets_are_those_that_peft_finds(fields: dict[str, Any]) -> None:
    paths = [path for path, _ in tiny_models.llama().named_modules()]
    found = []
    for library, function in zip(
        (peft, nbpeft), both("tuners.tuners_utils", "check_target_module_exists"), strict=True
    ):
        config = library.LoraConfig(**fields)
        found.append([path for path in paths if function(config, path)])
    assert found[0] == found[1] != []


def test_matched_modules_are_listed_as_by_peft() -> None:
    found = []
    for library, function in zip((peft, nbpeft), both("tuners.tuners_utils", "inspect_matched_modules"), strict=True):
        model = library.get_peft_model(tiny_models.llama(), library.LoraConfig(target_modules=["q_proj"]))
        found.append(function(model.base_model)["matched"])
    assert found[0] == found[1] != []


def test_all_linear_means_the_layers_that_peft_finds() -> None:
    found = []
    for library, fill in zip(
        (peft, nbpeft), both("tuners.tuners_utils", "_maybe_include_all_linear_layers"), strict=True
    ):
        config = fill(library.LoraConfig(target_modules="all-linear"), tiny_models.llama())
        found.append(set(config.target_modules))
        names = library.LoraConfig(target_modules=["q_proj"])
        assert fill(names, tiny_models.llama()).target_modules == {"q_proj"}
    assert found[0] == found[1] != set()


def test_the_fewest_suffixes_are_those_of_peft() -> None:
    targets = [f"model.layers.{number}.self_attn.q_proj" for number in range(12)]
    others = [f"model.layers.{number}.mlp.up_proj" for number in range(12)]
    theirs, ours = both("tuners.tuners_utils", "_find_minimal_target_modules")
    assert ours(targets, others) == theirs(targets, others) == {"q_proj"}
    assert ours(targets[:6], targets[6:]) == theirs(targets[:6], targets[6:])
    for wrong in ("q_proj", [], ["", "a"], ["b"]):
        with pytest.raises(ValueError, match="target_modules"):
            ours(wrong, ["b"])


def test_keys_of_adapters_are_those_of_peft() -> None:
    found = []
    for library in ("peft", "nbpeft"):
        names = importlib.import_module(library)
        tools = importlib.import_module(f"{library}.tuners.tuners_utils")
        model = names.get_peft_model(tiny_models.llama(), names.LoraConfig(target_modules=["q_proj"]))
        model.add_adapter("other", names.LoraConfig(target_modules=["q_proj"]))
        for name in (None, "other"):
            prefixes = tools._get_tuner_state_dict_key_prefixes(model, name)
            found.append(set(tools._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)))
    assert found[:2] == found[2:] and found[1] < found[0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("VBLoRAConfig", {"vector_length": 8, "num_vectors": 8}), ("VeraConfig", {}), ("LNTuningConfig", {})],
)
def test_keys_of_what_layers_share_are_keys_of_an_adapter(name: str, fields: dict[str, Any]) -> None:
    tools = importlib.import_module("nbpeft.tuners.tuners_utils")
    model = nbpeft.get_peft_model(tiny_models.llama(), getattr(nbpeft, name)(**fields), "one")
    first = set(model.state_dict())
    model.add_adapter("other", nbpeft.LoraConfig(target_modules=["o_proj"]))
    keys = model.state_dict()
    for adapter in ("one", "other"):
        prefixes = tools._get_tuner_state_dict_key_prefixes(model, adapter)
        found = set(tools._filter_state_dict_by_key_prefixes(keys, prefixes))
        assert found == {key for key in keys if f".{adapter}" in key} and found
    assert found.isdisjoint(first)


def test_blocks_are_those_of_peft() -> None:
    theirs, ours = both("utils.other", "_get_no_split_modules")
    assert ours(tiny_models.llama()) == set(theirs(tiny_models.llama())) == {"LlamaDecoderLayer"}


def test_an_adapter_is_frozen_and_activated() -> None:
    model = nbpeft.get_peft_model(tiny_models.llama(), nbpeft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", nbpeft.LoraConfig(target_modules=["q_proj"]))
    _, freeze = both("utils", "_freeze_adapter")
    _, activate = both("utils", "_set_adapter")
    freeze(model, "default")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    activate(model, "other")
    assert model.active_adapters == ["other"] and any(parameter.requires_grad for parameter in model.parameters())


def test_configs_of_two_methods_cannot_be_swapped() -> None:
    _, check = both("utils.hotswap", "check_hotswap_configs_compatible")
    check(nbpeft.LoraConfig(r=4), nbpeft.LoraConfig(r=8))
    with pytest.raises(nbpeft.HotSwapError, match="Incompatible PEFT types found: LORA and IA3"):
        check(nbpeft.LoraConfig(), nbpeft.IA3Config())


def test_a_dense_weight_is_the_parameter_itself() -> None:
    layer = nn.Linear(2, 3)
    assert all(read(layer) is layer.weight for read in both("utils.integrations", "dequantize_module_weight"))


def test_fsdp_wraps_what_pefts_policy_wraps() -> None:
    found = []
    for library, policy in zip((peft, nbpeft), both("utils.other", "fsdp_auto_wrap_policy"), strict=True):
        model = library.get_peft_model(tiny_models.llama(), library.LoraConfig(target_modules=["q_proj"]))
        wraps = policy(model)
        modules = [(path, module) for path, module in model.named_modules() if ".lora_" not in path]
        found.append([path for path, module in modules if wraps(module, False, 0)])
    assert found[0] == found[1] and "base_model.model.model.layers.0" in found[1]


def test_fsdp_wraps_the_classes_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    _, policy = both("utils.other", "fsdp_auto_wrap_policy")
    model = tiny_models.llama()
    assert policy(model)(model.model.layers[0].mlp, False, 0)
    assert not policy(model)(model.model.layers[0], False, 0)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "GptBlock")
    with pytest.raises(TypeError, match="no module of class GptBlock"):
        policy(model)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("task_arithmetic", ()),
        ("magnitude_prune", (0.5,)),
        ("ties", (0.5,)),
        ("ties", (0.4, "frequency")),
        ("dare_linear", (0.5,)),
        ("dare_ties", (0.7, "frequency")),
    ],
)
def test_tensors_are_combined_as_by_peft(name: str, settings: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    tensors, weights = [torch.randn(5, 7) for _ in range(3)], torch.tensor([1.0, -0.5, 2.0])
    results = []
    for function in both("utils.merge_utils", name):
        torch.manual_seed(1)
        results.append(function([tensor.clone() for tensor in tensors], weights, *settings))
    assert_close(*results)


def test_the_mappings_are_those_of_the_methods() -> None:
    mapping = importlib.import_module("nbpeft.mapping")
    theirs = importlib.import_module("peft.mapping")
    for table in ("CONFIG", "PREFIX", "TUNER"):
        ours, name = getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING"), f"PEFT_TYPE_TO_{table}_MAPPING"
        assert set(ours) == {method.peft_type for method in methods()} and len(ours) == len(set(ours))
        assert {"LORA", "IA3", "TRAINABLE_TOKENS"} <= set(ours) & set(getattr(theirs, name))
        assert {kind.value for kind in peft.PeftType} <= set(ours)
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is nbpeft.LoraConfig
    prefixes = mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    wanted = {kind: theirs.PEFT_TYPE_TO_PREFIX_MAPPING[kind] for kind in prefixes}
    wanted["ADAPTION_PROMPT"] = "adaption_"  # PEFT's "adaption_prompt_" begins none of its parameters' names
    assert dict(prefixes) == wanted
    tasks = importlib.import_module("nbpeft.auto").MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    assert tasks["CAUSAL_LM"] is nbpeft.PeftModelForCausalLM
    assert tasks.keys() == importlib.import_module("peft.auto").MODEL_TYPE_TO_PEFT_MODEL_MAPPING.keys()


def test_packages_are_found_where_peft_finds_them() -> None:
    ours = importlib.import_module("nbpeft.import_utils")
    theirs = importlib.import_module("peft.import_utils")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in set(ours.__all__) - {"is_torchao_available", "is_torchao_ge_v0_18_0"}:  # PEFT's may raise
            one, other = getattr(ours, name), getattr(theirs, name)
            assert (one if isinstance(one, bool) else one()) == bool(other if isinstance(other, bool) else other()), (
                name
            )


def test_adapters_to_merge_are_those_that_are_not_merged() -> None:
    layer = SimpleNamespace(active_adapters=["a", "b"], merged=True, merged_adapters=["a"])
    for check in both("tuners.tuners_utils", "check_adapters_to_merge"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of those that are added, too
            assert check(layer) == ["b"]
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            assert check(layer, ["a"]) == []
        with pytest.raises((TypeError, nbpeft.ConfigError), match="adapter_names should be a list of strings, got 'a'"):
            check(layer, "a")


@pytest.mark.parametrize("library", [nbpeft, peft], ids=["nbpeft", "peft"])
def test_functions_about_places_in_a_model(library: Any, tmp_path: Path) -> None:
    places = ("utils.save_and_load", "tuners.tuners_utils", "utils.transformers_weight_conversion")
    state, other, conversion = (importlib.import_module(f"{library.__name__}.{place}") for place in places)
    model = library.get_peft_model(tiny_models.llama(), library.LoraConfig(target_modules=["embed_tokens"]))
    base = model.get_base_model()
    layer, head = base.model.embed_tokens, base.lm_head
    assert state.has_valid_embedding_base_layer(layer) and not state.has_valid_embedding_base_layer(head)
    assert state.get_embedding_layer_name(base, layer, True) == "model.embed_tokens.base_layer"
    assert state.get_embedding_layer_name(base, head, False) == "lm_head"
    assert state.get_embedding_layer_name(base, head, True) is None
    assert other.find_parameter_name_by_module(base, head) == "lm_head"
    assert other.find_parameter_name_by_module(base, nn.Linear(1, 1)) == ""
    assert other.get_device_map(base) == {"": torch.device("cpu")}
    torch.save({"weight": torch.ones(2)}, tmp_path / "file")
    assert torch.equal(state.torch_load(tmp_path / "file")["weight"], torch.ones(2))
    torch.save(nn.Linear(1, 1), tmp_path / "file")
    with pytest.raises(Exception, match=r"(?i)weights"):
        state.torch_load(tmp_path / "file")
    assert conversion.get_model_conversion_mapping(tiny_models.mixture("mixtral"))


def test_trained_token_rows_are_no_keys_of_an_adapter() -> None:
    found = []
    for library in ("peft", "nbpeft"):
        names = importlib.import_module(library)
        tools = importlib.import_module(f"{library}.tuners.tuners_utils")
        config = names.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[0, 1])
        model = names.get_peft_model(tiny_models.llama(), config)
        prefixes = tools._get_tuner_state_dict_key_prefixes(model)
        found.append(set(tools._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)))
        assert prefixes and not any("embed_tokens" in prefix for prefix in prefixes)
    assert found[0] == found[1] and found[0]


def test_adapters_of_tensor_parallel_layers_are_refused_and_others_left_as_they_are() -> None:
    from nbpeft.errors import NotSupportedError

    shard = importlib.import_module("nbpeft.utils.save_and_load")._maybe_shard_state_dict_for_tp

    model = nbpeft.get_peft_model(tiny_models.llama(), nbpeft.LoraConfig(target_modules=["q_proj"]))
    tensors = {"a": torch.ones(2)}
    shard(model, tensors, "default")
    assert torch.equal(tensors["a"], torch.ones(2))
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.base_layer._hf_tp_plan, layer.base_layer._hf_device_mesh = "colwise", object()
    with pytest.raises(NotSupportedError, match="q_proj is tensor parallel: adapter 'default' cannot be loaded"):
        shard(model, tensors, "default")
