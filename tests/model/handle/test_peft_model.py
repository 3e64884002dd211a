"""PEFT's names on a handle: what each does, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nbpeft.model as nbpeft
from nbpeft import CartridgeConfig, VBLoRAConfig
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, UnknownAdapterError
from nbpeft.model import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from tests.closeness import assert_close, differ
from tests.tiny_models import VOCABULARY, adapted, config, llama, logits, same_state, state, tokens


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("", "get_peft_model"),
        ("", "get_peft_model_state_dict"),
        ("", "inject_adapter_in_model"),
        ("PeftModel", "from_pretrained"),
        ("PeftModel", "load_adapter"),
        ("PeftModel", "save_pretrained"),
        ("PeftModel", "add_adapter"),
        ("PeftModel", "set_adapter"),
        ("PeftModel", "delete_adapter"),
        ("PeftModel", "set_requires_grad"),
        ("PeftModel", "disable_adapter"),
        ("PeftModel", "get_base_model"),
        ("LoraConfig", "__init__"),
    ],
)
def test_signatures_and_defaults_are_those_of_peft(owner: str, name: str) -> None:
    ours, theirs = (getattr(module, owner) if owner else module for module in (nbpeft, peft))
    own, other = (inspect.signature(getattr(place, name)).parameters for place in (ours, theirs))
    named = {key for key, value in other.items() if value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)}
    assert named <= set(own)
    for key in named - {"runtime_config", "self"}:
        default = other[key].default
        factory = "<factory>" in repr(default)
        assert factory or own[key].default == default, key


def test_every_field_of_loraconfig_has_pefts_default() -> None:
    ours, theirs = LoraConfig().to_dict(), peft.LoraConfig().to_dict()
    assert set(theirs) - {"peft_version"} <= set(ours) | {"peft_version"}
    for key, value in theirs.items():
        if key not in ("peft_version", "peft_type", "runtime_config"):
            assert ours[key] == value, key


def test_activity_and_trainability() -> None:
    model = adapted()
    model.add_adapter("other", config(r=2))
    model.eval()
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    first = logits(model)
    model.set_adapter("other")
    assert model.active_adapter == "other"
    assert all(p.requires_grad for p in model.manager.parameters("other"))
    assert not any(p.requires_grad for p in model.manager.parameters("default"))
    second = logits(model)
    model.set_adapter(["default", "other"], inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    both, base = logits(model), logits(llama())
    assert differ(both, first) and differ(both, second)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), both)
    with model.use("other"):
        assert torch.equal(logits(model), second)
    assert torch.equal(logits(model), both)


def test_unknown_names_are_answered_with_near_ones() -> None:
    model = adapted(name="orders")
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(UnknownAdapterError, match=r"'?order'? (not found|does not exist).*Did you mean 'orders'"):
            call("order")
    with pytest.raises(ValueError, match="Adapter with name 'orders' already exists"):
        model.add_adapter("orders", config())
    for bad in ("a.b", "", "a/b", "__base__", 3):
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            model.add_adapter(bad, config())  # type: ignore[arg-type]


def test_several_adapters_are_deleted_at_once_or_none() -> None:
    model = adapted(name="first")
    for name in ("second", "third"):
        model.add_adapter(name, config())
    with pytest.raises(UnknownAdapterError, match="fourth does not exist"):
        model.delete_adapter(["first", "fourth"])
    assert list(model.peft_config) == ["first", "second", "third"] and model.active_adapters == ["first"]
    with pytest.warns(UserWarning, match="the active adapter 'first' was deleted: 'third' is active now"):
        model.delete_adapter(["first", "second", "first"])
    assert list(model.peft_config) == ["third"]
    model.base_model.delete_adapter(["third"])
    assert not model.peft_config and torch.equal(logits(model), logits(llama()))


def test_attributes_fall_through_and_names_have_pefts_prefix() -> None:
    model = adapted()
    assert model.config.hidden_size == 32 and model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    assert all(name.startswith("base_model.model.") for name, _ in model.named_parameters())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.scaling["default"] == 2.0 and layer.weight.shape == (32, 32) and layer.in_features == 32
    with pytest.raises(AttributeError):
        model.nothing_of_the_kind  # noqa: B018


def test_trainable_parameters_are_counted_as_peft_does(capsys: Any) -> None:
    ours = adapted(modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    own = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert own == capsys.readouterr().out


def test_merge_unmerge_unload() -> None:
    base = llama()
    before, trainable = state(base), [n for n, p in base.named_parameters() if p.requires_grad]
    model = adapted(base, use_dora=True)
    expected = logits(model)
    model.merge_adapter()
    assert_close(logits(model), expected)
    with pytest.warns(UserWarning, match="merged: unmerging"), model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert plain is base and same_state(before, state(base))
    assert trainable == [n for n, p in base.named_parameters() if p.requires_grad]


def test_safe_merge_refuses_broken_adapters_and_merges_nothing() -> None:
    model = adapted()
    broken = model.manager.parameters("default")[-1]
    with torch.no_grad():
        broken[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert [n for n, v in state(model).items() if not torch.equal(v, before[n])] == [
        n for n, v in before.items() if v.isnan().any()
    ]


def test_merge_of_several_adapters_is_their_sum() -> None:
    model = adapted()
    model.add_adapter("other", config(r=2))
    model.eval()
    model.set_adapter(["default", "other"])
    expected = logits(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert_close(logits(merged), expected)


def test_renaming_copying_scaling_freezing() -> None:
    model = adapted()
    first = logits(model)
    manager = model.manager
    manager.copy("default", "twin")
    manager.set_scale("twin", 0.0)
    model.set_adapter("twin")
    assert torch.equal(logits(model.eval()), logits(llama()))
    manager.set_scale("twin", 1.0)
    assert torch.equal(logits(model), first)
    manager.rename("default", "renamed")
    assert manager.names == ("renamed", "twin")
    model.set_adapter("renamed")
    assert torch.equal(logits(model), first)
    manager.freeze("renamed")
    assert not any(p.requires_grad for p in model.parameters())
    manager.unfreeze("renamed")
    assert all(p.requires_grad for p in manager.parameters("renamed"))


def test_several_adapters_are_saved_as_peft_lays_them_out(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", config(r=2))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "other",
    }
    assert {p.name for p in (tmp_path / "other").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"README.md", "other"}
    result = adapted().load_adapter(tmp_path / "other", "loaded")
    assert result.missing_keys == [] and result.unexpected_keys == []


def test_half_precision_bases_get_float32_adapters_unless_told_otherwise(tmp_path: Path) -> None:
    base = llama().to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), config())
    assert {p.dtype for p in model.manager.parameters("default")} == {torch.float32}
    half = get_peft_model(copy.deepcopy(base), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.manager.parameters("default")} == {torch.bfloat16}
    assert logits(model).dtype == logits(half).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for p in loaded.manager.parameters("default")} == {torch.bfloat16}


def test_state_dicts_under_the_keys_of_files() -> None:
    model, other = adapted(), adapted(r=4)
    tensors = get_peft_model_state_dict(model)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.mul_(2)
    result = set_peft_model_state_dict(other, tensors)
    assert result.missing_keys == [] and torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="do not fit"):
        set_peft_model_state_dict(adapted(r=2), tensors)


def test_injection_without_a_handle() -> None:
    base = llama()
    assert inject_adapter_in_model(config(), base) is base
    manager = manager_of(base)
    assert manager is not None and manager.active == ("default",)
    assert not torch.equal(logits(base), logits(llama()))


def test_configs_and_weights_load_by_themselves(tmp_path: Path) -> None:
    model = adapted(r=6, task_type="CAUSAL_LM")
    assert isinstance(model, PeftModelForCausalLM)
    model.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(read, LoraConfig) and read.r == 6 and read.inference_mode
    assert len(load_peft_weights(tmp_path, device="cpu")) == 8
    read.save_pretrained(str(tmp_path / "config"))
    assert LoraConfig.from_pretrained(str(tmp_path / "config")).r == 6


PACKED = {
    "one tensor of two": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1),
    "more tensors": config(task_type="CAUSAL_LM", monteclora_config={"num_samples": 2}),
    "fewer tensors": VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj"], topk=2),
}


@pytest.mark.parametrize("given", PACKED.values(), ids=PACKED)
def test_weights_are_read_as_the_file_has_them(given: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama(), given).eval()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    found = load_peft_weights(tmp_path, device="cpu")
    assert found.keys() == file.keys() and all(torch.equal(found[key], tensor) for key, tensor in file.items())
    other = get_peft_model(llama(), given.copy()).eval()
    assert not set_peft_model_state_dict(other, found).missing_keys
    assert torch.equal(logits(other), logits(model))


def test_auto_model_loads_the_base_the_adapter_names(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base").eval()
    model = adapted(base, task_type="CAUSAL_LM")
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoPeftModelForCausalLM()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r must be a positive whole number"),
        ({"r": 2.5}, "r must be a positive whole number"),
        ({"lora_dropout": 1.5}, "between 0 and 1"),
        ({"bias": "lora_olny"}, "Did you mean 'lora_only'"),
        ({"init_lora_weights": "gausian"}, "Did you mean 'gaussian'"),
        ({"task_type": "CAUSAL"}, "Did you mean 'CAUSAL_LM'"),
        ({"target_modules": "q(", "layers_to_transform": None}, "not a regular expression"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "needs target_modules to be a list"),
        ({"layers_pattern": "h"}, "needs layers_to_transform"),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, "not implemented"),
        ({"lora_bias": True, "use_dora": True}, "is not supported for DoRA"),
    ],
)
def test_impossible_configs_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_mixed_batches_give_each_row_its_own_adapter() -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("wide", config(r=8, target_modules="all-linear"))
    model.add_adapter("dora", config(r=2, target_modules=["down_proj"], use_dora=True))
    model.add_adapter("words", config(r=2, target_modules=["embed_tokens"]))
    model.eval()
    names = ["wide", "default", "__base__", "dora", "words", "wide"]
    ids = tokens(len(names))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=4, num_beams=2
    )
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        with model.disable_adapter() if name == "__base__" else model.use(name):
            assert_close(logits(model, one)[0], mixed[row], message=name)
            alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), max_new_tokens=4, num_beams=2)
        width = min(alone.shape[1], generated.shape[1])
        assert torch.equal(alone[0, :width], generated[row, :width]), name
    mistakes: list[tuple[Any, str]] = [
        (["wide"], "1 names for 6 rows"),
        (["nope"] * 6, "'nope' not found"),
        ([["wide"]] * 6, "one name for each row of the batch, not "),
    ]
    for bad, message in mistakes:
        with pytest.raises(AdapterError, match=message):
            model(input_ids=ids, adapter_names=bad)
    model.train()
    with pytest.raises(AdapterError, match="inference"):
        model(input_ids=ids, adapter_names=names)


def test_copies_are_independent() -> None:
    model = adapted(modules_to_save=["lm_head"])
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        twin.delete_adapter("default")
        assert torch.equal(logits(twin), logits(llama()))
    assert torch.equal(logits(model), expected)


def test_gradient_checkpointing_and_compilation_train_the_same() -> None:
    def gradients(prepare: Any) -> list[torch.Tensor]:
        model = adapted(llama(), target_modules="all-linear").train()
        run = prepare(model)
        ids = tokens()
        run(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.manager.parameters("default") if p.grad is not None]

    def checkpointed(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        return model

    plain, again = gradients(lambda model: model), gradients(checkpointed)
    assert len(plain) == 28 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
def test_compiled_whole_in_one_graph() -> None:
    torch._dynamo.reset()
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    for use_dora in (False, True):
        model = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, use_dora=use_dora)
        )
        compiled = torch.compile(model, fullgraph=True)
        x = torch.randn(8, 16)
        assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        assert all(p.grad is not None for p in model.manager.parameters("default"))


@pytest.mark.parametrize("wrong", [None, 3, "sql", {"r": 4}, ["sql", 3]])
def test_values_of_another_kind_are_refused_in_one_line_and_change_nothing(wrong: Any, tmp_path: Path) -> None:
    model = adapted()
    before = state(model)
    with pytest.raises(ConfigError, match=r"^an adapter needs a config such as LoraConfig, not "):
        model.add_adapter("new", wrong)
    with pytest.raises(AdapterError):
        model.delete_adapter(wrong)
    if not isinstance(wrong, dict):
        with pytest.raises(ConfigError, match=r"^the state dict must be a dictionary of tensors, not "):
            nbpeft.set_peft_model_state_dict(model, wrong)
    assert same_state(state(model), before) and model.manager.names == ("default",)


def test_a_folder_without_a_name_is_refused_as_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files would come into the working directory, and a card into the README of a project."""
    monkeypatch.chdir(tmp_path)
    for model in (adapted(), peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises((CheckpointError, FileNotFoundError)):
            model.save_pretrained("")
    assert not list(tmp_path.iterdir())


def test_names_of_the_base_that_are_overridden_are_told() -> None:
    base = llama()
    base.config._name_or_path = base.name_or_path = "here/tiny"
    with pytest.warns(UserWarning, match="renamed from 'elsewhere' to 'here/tiny'"):
        model = get_peft_model(base, config(base_model_name_or_path="elsewhere"))
    assert model.peft_config["default"].base_model_name_or_path == "here/tiny"
    with pytest.warns(UserWarning, match="revision 'v1' of the base model is replaced by 'v2'"):
        model = get_peft_model(llama(), config(revision="v1"), revision="v2")
    assert model.peft_config["default"].revision == "v2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(model.unload(), config(base_model_name_or_path=None, revision="v1"), revision="v1")


def test_a_name_that_the_base_does_not_have_is_removed_as_in_peft() -> None:
    for library in (peft, nbpeft):
        given = library.LoraConfig(target_modules=["0"], base_model_name_or_path="elsewhere")
        with pytest.warns(UserWarning, match="renamed from 'elsewhere' to 'None'"):
            model = library.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), given)
        assert model.peft_config["default"].base_model_name_or_path is given.base_model_name_or_path is None


def test_the_card_has_the_tags_of_the_base(tmp_path: Path) -> None:
    base = llama()
    base.model_tags = ["tiny"]
    get_peft_model(base, config()).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"- {tag}\n" in text for tag in ("tiny", "lora", "transformers"))
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "other")
    assert "transformers" not in (tmp_path / "other" / "README.md").read_text(encoding="utf-8").split("---")[1]
