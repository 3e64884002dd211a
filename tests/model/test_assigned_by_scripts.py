"""What scripts assign to PEFT's models or do to their helpers acts as in PEFT, or is refused in a line."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import nbpeft
from tests.closeness import assert_close, assert_same, differ
from tests.model.test_scripts_of_others import LIBRARIES, lora, prompted
from tests.tiny_models import llama, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

# peft_config


@LIBRARIES
@pytest.mark.parametrize("place", ["handle", "tuner"])
def test_peft_config_can_be_assigned(library: Any, place: str, tmp_path: Path) -> None:
    model = lora(library)
    before = logits(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = str(tmp_path / "base")
    (model if place == "handle" else model.base_model).peft_config = {"default": config}
    assert model.peft_config["default"] is config and model.base_model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    assert library.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(tmp_path / "base")
    assert_close(logits(model), before)


@LIBRARIES
def test_so_can_that_of_a_prompt(library: Any) -> None:
    model = prompted(library, "PromptTuningConfig")
    config = copy.deepcopy(model.peft_config["default"])
    model.peft_config = {"default": config}
    assert model.peft_config["default"] is config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "must be a dictionary with a config for 'default', not one with none: add_adapter"),
        ({"other": nbpeft.LoraConfig()}, "not one with 'other'"),
        (nbpeft.LoraConfig(), r"not LoraConfig\("),
        ({"default": nbpeft.IA3Config()}, "adapter 'default' has a LoraConfig: its config cannot be an IA3Config"),
        ({"default": 3}, "its config cannot be an int"),
    ],
)
def test_one_that_does_not_fit_is_refused(given: Any, message: str) -> None:
    model = lora(nbpeft)
    config = model.peft_config["default"]
    with pytest.raises(nbpeft.ConfigError, match=message):
        model.peft_config = given
    assert model.peft_config == {"default": config} and model.peft_config["default"] is config


# rankallocator


def adalora(library: Any) -> Any:
    settings = {"init_r": 6, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj"]}
    model = library.get_peft_model(llama(), library.AdaLoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def backward(model: Any) -> None:
    model(tokens(), labels=tokens()).loss.backward()


def test_the_rank_allocator_has_what_scripts_read_and_call() -> None:
    (ours, own), (theirs, other) = ((model, model.base_model.rankallocator) for model in map(adalora, (nbpeft, peft)))
    for name in ("init_bgt", "target_bgt", "beta1", "beta2", "adapter_name", "name_set"):
        assert getattr(own, name) == getattr(other, name), name
    assert [own.budget_schedule(step) for step in range(12)] == [other.budget_schedule(step) for step in range(12)]
    for model, allocator in ((ours, own), (theirs, other)):
        backward(model)
        allocator.update_ipt(model.base_model.model)
    for name in ("exp_avg_ipt", "exp_avg_unc"):
        averages = getattr(own, name)
        assert averages.keys() == getattr(other, name).keys()
        assert_close(dict(averages), {key: getattr(other, name)[key] for key in averages})
    left = own.mask_to_budget(ours.base_model.model, 7)
    assert left == other.mask_to_budget(theirs.base_model.model, 7) and sum(map(sum, left.values())) == 7
    assert own.update_and_allocate(ours, 3) == other.update_and_allocate(theirs.base_model.model, 3)
    assert own.update_and_allocate(ours, 0)[1] is None
    fewer = {name: [flag and place < 3 for place, flag in enumerate(flags)] for name, flags in left.items()}
    own.mask_using_rank_pattern(ours, fewer)
    other.mask_using_rank_pattern(theirs.base_model.model, fewer)
    assert_close(logits(ours.eval()), logits(theirs.eval()))
    own.set_total_step(20)
    assert ours.peft_config["default"].total_step == 20 and own.peft_config is ours.peft_config["default"]
    own.reset_ipt()
    assert own.exp_avg_ipt == {}


def test_the_allocator_is_of_peft_s_class_and_takes_no_attributes() -> None:
    allocator = adalora(nbpeft).base_model.rankallocator
    assert isinstance(allocator, importlib.import_module("nbpeft.tuners.adalora").RankAllocator)
    with pytest.raises(AttributeError):
        allocator.exp_avg_ipt = {}
    with pytest.raises(AttributeError):
        allocator.ipt = {}


# Prompt encoders


@LIBRARIES
@pytest.mark.parametrize("assign", ["item", "update", "attribute"])
def test_an_encoder_can_be_assigned(library: Any, assign: str) -> None:
    model = prompted(library, "PromptTuningConfig")
    other = library.PromptEmbedding(model.peft_config["default"], model.word_embeddings)
    other.embedding.weight.data.fill_(0.25)
    if assign == "item":
        model.prompt_encoder["default"] = other
    elif assign == "update":
        model.prompt_encoder.update({"default": other})
    else:
        model.prompt_encoder.default = other
    assert any(parameter is other.embedding.weight for parameter in model.parameters())
    same = prompted(peft, "PromptTuningConfig")
    same.prompt_encoder["default"].embedding.weight.data.fill_(0.25)
    assert_close(logits(model), logits(same))
    backward(model)
    assert other.embedding.weight.grad is not None


def test_a_prompt_that_a_script_makes_starts_as_peft_s() -> None:
    settings = {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB", "task_type": "CAUSAL_LM"}
    rows = []
    for library in (peft, nbpeft):
        model = library.get_peft_model(llama(), library.PromptTuningConfig(**settings))
        torch.manual_seed(5)
        rows.append(library.PromptEmbedding(model.peft_config["default"], model.word_embeddings).embedding.weight)
    assert_close(*(row.detach() for row in rows))
    with pytest.raises(nbpeft.ConfigError, match="word_embeddings must be an embedding, not a Linear"):
        nbpeft.PromptEmbedding(model.peft_config["default"], nn.Linear(2, 2))


MULTITASK = {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2}
CPT = {"cpt_token_ids": [5, 7, 9], "cpt_tokens_type_mask": [1, 2, 4]}


@pytest.mark.parametrize(
    ("package", "kind", "fields"),
    [("multitask_prompt_tuning", "MultitaskPrompt", MULTITASK), ("cpt", "CPT", CPT)],
)
def test_so_do_the_other_kinds_and_they_can_be_called(package: str, kind: str, fields: dict[str, Any]) -> None:
    found = []
    for library in (peft, nbpeft):
        room = importlib.import_module(f"{library.__name__}.tuners.{package}")
        config = getattr(room, f"{kind}Config" if kind == "CPT" else f"{kind}TuningConfig")
        model = library.get_peft_model(llama(), config(task_type="CAUSAL_LM", **fields))
        torch.manual_seed(5)
        encoder = getattr(room, f"{kind}Embedding")(model.peft_config["default"], model.word_embeddings)
        ids = torch.arange(3).expand(2, -1)
        of_tasks = () if kind == "CPT" else (torch.tensor([1, 0]),)
        found.append({"drawn": torch.rand(1), "called": encoder(ids, *of_tasks), **encoder.state_dict()})
    assert_close(*found)


def test_an_encoder_that_would_not_be_called_is_refused() -> None:
    model = prompted(nbpeft, "PromptTuningConfig")
    before = logits(model)
    longer = nbpeft.get_peft_model(llama(), nbpeft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    refused = {
        "a Linear would not be called": nn.Linear(2, 2),
        r"has parameters \{'embedding.weight': \(3, ": longer.prompt_encoder["default"],
    }
    for message, module in refused.items():
        with pytest.raises(nbpeft.AdapterError, match=message):
            model.prompt_encoder["default"] = module
    with pytest.raises(nbpeft.UnknownAdapterError, match="default"):
        model.prompt_encoder["other"] = longer.prompt_encoder["default"]
    with pytest.raises(nbpeft.AdapterError, match=r"delete_adapter\('default'\)"):
        del model.prompt_encoder["default"]
    assert_close(logits(model), before)


# Layers and tuners


@LIBRARIES
@pytest.mark.parametrize("how", ["clear", "assign", "pop", "delete"])
def test_emptying_merged_adapters_keeps_the_merged_weight(library: Any, how: str) -> None:
    model, same = lora(library), lora(peft)
    for layer in model.modules():
        if not isinstance(layer, importlib.import_module(f"{library.__name__}.tuners.lora").Linear):
            continue
        layer.merge()
        if how == "clear":
            layer.merged_adapters.clear()
        elif how == "assign":
            layer.merged_adapters = []
        elif how == "pop":
            assert layer.merged_adapters.pop() == "default"
        else:
            del layer.merged_adapters[0]
        assert not layer.merged and layer.merged_adapters == []
    doubled = logits(model)  # the factors act again, on the merged weight
    for layer in same.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 2)
    assert_close(doubled, logits(same))
    with model.disable_adapter():
        assert_close(logits(model), logits(lora(peft)))
    model.merge_adapter()
    assert_close(logits(model), doubled)
    model.unmerge_adapter()
    assert_close(logits(model), doubled)


def test_merged_adapters_are_not_changed_otherwise() -> None:
    model = lora(nbpeft)
    model.add_adapter("other", nbpeft.LoraConfig(r=2))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.merge(adapter_names=["default", "other"])
    merged = layer.merged_adapters
    assert merged == ["default", "other"] and copy.deepcopy(merged) == merged
    for change in (merged.pop, lambda: merged.append("more"), lambda: merged.remove("other")):
        with pytest.raises(nbpeft.MergeError, match="can only be emptied, which keeps the merged weight"):
            change()
    with pytest.raises(nbpeft.MergeError, match="call merge"):
        layer.merged_adapters = ["other"]
    layer.merged_adapters = ["default", "other"]
    layer.unmerge()
    assert_close(logits(model), logits(lora(peft)))


@LIBRARIES
def test_injecting_into_a_tuner_activates_nothing(library: Any) -> None:
    model = lora(library)
    before = logits(model)
    model.base_model.peft_config["other"] = library.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model.base_model.inject_adapter(model.base_model.model, "other")
    assert model.base_model.active_adapters == ["default"] and [*model.peft_config] == ["default", "other"]
    assert_close(logits(model.eval()), before)
    model.set_adapter("other")
    assert differ(logits(model), before)


def test_a_part_that_a_script_takes_out_is_refused_with_the_way_to_rename() -> None:
    layer = lora(nbpeft).base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(nbpeft.AdapterError, match=r"model\.manager\.rename\(old, new\)"):
        layer.lora_A.pop("default")


def test_a_config_is_not_taken_away_from_its_adapter() -> None:
    model = lora(nbpeft)
    before = logits(model)
    for take in (model.peft_config.pop, model.peft_config.__delitem__):
        with pytest.raises(nbpeft.AdapterError, match=r"model\.manager\.rename\('default', new\) renames it"):
            take("default")
    assert model.active_adapters == ["default"]
    assert_same(logits(model), before)
    model.peft_config["other"] = nbpeft.LoraConfig(r=2)  # of no adapter yet
    assert model.peft_config.pop("other").r == 2 and [*model.peft_config] == ["default"]


# Helpers


@LIBRARIES
@pytest.mark.parametrize(
    ("name", "error"), [("lora", KeyError), ("LORA", ValueError), ("lora_", ValueError), ("mine", ValueError)]
)
def test_registering_a_method_is_refused_as_in_peft(library: Any, name: str, error: type[Exception]) -> None:
    register = importlib.import_module(f"{library.__name__}.utils").register_peft_method
    with pytest.raises(error):
        register(name=name, config_cls=library.LoraConfig, model_cls=library.LoraModel)


def test_a_new_method_is_registered_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = importlib.import_module("nbpeft.peft_api.mappings")
    monkeypatch.setattr(mapping, "PEFT_TYPE_TO_CONFIG_MAPPING", {})
    monkeypatch.setattr(mapping, "PEFT_TYPE_TO_PREFIX_MAPPING", {})
    with pytest.raises(nbpeft.NotSupportedError, match="LoraModel cannot be registered: nbpeft calls no tuner classes"):
        mapping.register_peft_method(name="lora", config_cls=None, model_cls=nbpeft.LoraModel)


@LIBRARIES
def test_the_type_of_a_saved_adapter_can_be_read(library: Any, tmp_path: Path) -> None:
    lora(peft).save_pretrained(tmp_path)
    assert library.PeftConfig._get_peft_type(str(tmp_path)) == "LORA"
    with pytest.raises(ValueError, match=r"adapter_config\.json|no folder"):
        library.PeftConfig._get_peft_type(str(tmp_path / "none"))


# Paths and key mappings


@LIBRARIES
@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_a_type_error(library: Any, path: Any) -> None:
    model = lora(library)
    uses = [
        lambda: library.PeftModel.from_pretrained(llama(), path),
        lambda: library.PeftConfig.from_pretrained(path),
        lambda: model.load_adapter(path, "other"),
        lambda: model.save_pretrained(path),
        lambda: library.AutoPeftModel.from_pretrained(path),
    ]
    for use in uses:
        with pytest.raises(TypeError) as raised:
            use()
        if library is nbpeft:
            assert str(raised.value) == f"expected a folder or hub id, a text or a path, not {path}"


@pytest.mark.parametrize("mapping", [3, {"a": 3}, {4: "a"}, [("a", "b")]])
def test_a_key_mapping_that_is_none_is_refused(mapping: Any, tmp_path: Path) -> None:
    lora(nbpeft).save_pretrained(tmp_path)
    with pytest.raises(nbpeft.ConfigError, match="key_mapping must be a dictionary of regular expressions and"):
        nbpeft.PeftModel.from_pretrained(llama(), tmp_path, key_mapping=mapping)
