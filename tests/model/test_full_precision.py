"""Merging into a full-precision copy on disk, and the error of each way to merge."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM

from nbpeft.engine.contract.adapter import add_to_
from nbpeft.errors import AdapterError, CheckpointError, CheckpointNotFoundError, ConfigError, MergeError
from nbpeft.model import PeftModel
from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.model.saving.merge_export import merge_errors, merge_to_folder
from tests.closeness import assert_close
from tests.model.allocations import Allocations, bytes_of
from tests.tiny_models import adapted, gpt2, llama, logits, same_state, state

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:merging into", "ignore::FutureWarning", "ignore::UserWarning:peft")

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "head-adapted": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def loud(model: Any) -> Any:
    """The model with adapters that do something."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def reloaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_live_model(variant: str, tied: bool, tmp_path: Path) -> None:
    model = loud(adapted(llama(tie_word_embeddings=tied), **VARIANTS[variant]))
    before, wanted = state(model), logits(model)
    done = merge_to_folder(model, "default", tmp_path / "out")
    assert same_state(state(model), before)
    assert_close(logits(reloaded(tmp_path / "out")), wanted)
    assert done.dtype == "float32" and done.names == ("default",) and len(done.shard_bytes) == 1


@pytest.mark.parametrize("variant", ["all-linear", "dora", "head"])
def test_a_base_on_disk_is_never_loaded(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = loud(adapted(base, **VARIANTS[variant]))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    done = merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    monkeypatch.undo()
    assert_close(logits(reloaded(tmp_path / "out")), logits(model))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    assert len(done.shard_bytes) == len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in safetensors.torch.load_file(tmp_path / "out" / file)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 2e-5), (8, 6e-3)])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_quantized_model_becomes_a_full_precision_one(make: Any, bits: int, tolerance: float, tmp_path: Path) -> None:
    base = quantize_model(make(), bits=bits)
    targets = ["c_attn", "c_proj"] if make is gpt2 else "all-linear"
    model = loud(adapted(base, target_modules=targets))
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()  # in eval mode some CPUs round the constants
    wanted = logits(model)
    done = merge_to_folder(model, None, tmp_path / "out", dtype="float32")
    merged = reloaded(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config") and type(merged) is type(base)
    error = (logits(merged) - wanted).norm() / wanted.norm()
    assert error < tolerance
    assert done.errors is not None and done.errors.requantized is not None
    assert done.errors.full_precision < 1e-7 < done.errors.requantized


def test_the_errors_are_those_that_merging_makes() -> None:
    model = loud(adapted(quantize_model(llama(hidden_size=64)), target_modules="all-linear")).train()
    before = state(model)
    told = merge_errors(model, dtype="bfloat16")
    assert same_state(state(model), before)
    assert 1e-4 < told.full_precision < 4e-3 < 0.05 < (told.requantized or 0) < 0.2
    layer = model.manager.layers[told.layers[3].path]
    exact = layer.base.weight().float()
    add_to_(layer.adapter("default"), exact, layer.base, 1.0)
    model.merge_adapter()
    error = float((layer.base.weight() - exact).norm() / exact.norm())
    assert_close(told.layers[3].requantized, error)
    assert told.worst() in told.layers
    delta = layer.adapter("default").delta_weight(exact, layer.base)
    assert_close(told.layers[3].delta_norm, float(delta.norm()))
    assert told.of_delta(told.full_precision) > told.full_precision


def test_a_small_delta_is_lost_when_it_is_quantized_again() -> None:
    model = adapted(quantize_model(llama(hidden_size=64)), target_modules="all-linear")
    with torch.no_grad():
        for parameter in model.manager.parameters("default"):
            parameter.copy_(torch.randn_like(parameter) * 1e-4)
    told = merge_errors(model, dtype="float32")
    assert told.requantized is not None and told.requantized < 1e-3, "hardly seen beside the weight"
    assert told.of_delta(told.requantized) > 0.8 > 1e-2 > told.of_delta(told.full_precision)
    one = told.requantized / told.of_delta(told.requantized)
    words = {0.0712: "7.1 %", 0.25: "25 %", 0.99: "99 %", 0.996: "100 %", 1.13: "113 %", 25.0: "2,500 %"}
    assert {share: told.delta_message(share * one) for share in words} == words


def test_requantizing_is_no_worse_than_peft() -> None:
    torch.manual_seed(0)
    dense = llama(hidden_size=64)
    for bits in (4, 8):
        base = quantize_model(copy.deepcopy(dense), bits=bits)
        ours = loud(adapted(copy.deepcopy(base), target_modules=["q_proj", "down_proj"]))
        told = merge_errors(ours)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
        for path, layer in ours.manager.layers.items():
            for name in ("lora_A", "lora_B"):
                their = theirs.base_model.model.get_submodule(f"{path}.{name}.default")
                their.weight.data.copy_(getattr(layer.adapter("default"), name))
        exact = {
            path: layer.base.weight().float() + layer.adapter("default").delta_weight(layer.base.weight(), layer.base)
            for path, layer in ours.manager.layers.items()
        }
        theirs.merge_adapter()
        for layer_error in told.layers:
            module = theirs.base_model.model.get_submodule(layer_error.path)
            merged = peft.utils.integrations.dequantize_module_weight(module.get_base_layer()).float()
            wanted = exact[layer_error.path]
            assert (layer_error.requantized or 0) <= float((merged - wanted).norm() / wanted.norm()) * (1 + 1e-6)


def test_deltas_on_the_original_weights(tmp_path: Path) -> None:
    dense = llama()
    dense.save_pretrained(tmp_path / "base")
    model = loud(adapted(quantize_model(copy.deepcopy(dense)), target_modules="all-linear"))
    done = merge_to_folder(model, "default", tmp_path / "out", base=tmp_path / "base")
    merged = reloaded(tmp_path / "out")
    for path, layer in model.manager.layers.items():
        exact = dense.get_submodule(path).weight + layer.adapter("default").delta_weight(
            dense.get_submodule(path).weight, layer.base
        )
        assert_close(merged.get_submodule(path).weight, exact)
    assert done.errors is not None and 0.01 < done.errors.full_precision < 0.2, "not what it was trained on"


def test_several_adapters_scales_and_dtype(tmp_path: Path) -> None:
    model = adapted(llama(attention_bias=True), name="a", lora_bias=True)
    model.add_adapter("b", model.peft_config["a"].copy(r=2))
    model.base_model.set_adapter(["a", "b"])
    loud(model)
    model.manager.set_scale("b", 0.5)
    wanted = logits(model)
    merge_to_folder(model, ["a", "b"], tmp_path / "out")
    assert_close(logits(reloaded(tmp_path / "out")), wanted)
    done = merge_to_folder(model, ["a", "b"], tmp_path / "half", dtype="bf16")
    half = reloaded(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and done.byte_count * 2 == bytes_of(llama(attention_bias=True).parameters())


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["norm"]}])
def test_a_model_that_was_cast_is_written_as_it_is(changes: dict[str, Any], tmp_path: Path) -> None:
    llama().bfloat16().save_pretrained(tmp_path / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = loud(adapted(base.float(), **changes))
    wanted = logits(model)
    assert merge_to_folder(model, None, tmp_path / "out").dtype == "float32"
    assert_close(logits(reloaded(tmp_path / "out")), wanted)


@pytest.mark.parametrize("changes", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_the_errors_of_a_head_that_shares_its_weight(changes: dict[str, Any]) -> None:
    model = loud(adapted(quantize_model(llama(tie_word_embeddings=True)), **changes))
    errors = merge_errors(model)
    end = changes.get("target_modules", ["model.embed_tokens"])[0]  # rows leave the two one weight, which is there once
    paths = {layer.path for layer in errors.layers}
    assert paths & {"lm_head", "model.embed_tokens"} == {end} and errors.full_precision < 1e-6
    expected = logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).norm() < 0.5 * expected.norm()


def test_two_copies_of_a_module_are_not_merged(tmp_path: Path) -> None:
    model = loud(adapted(llama(), modules_to_save=["lm_head"]))
    model.add_adapter("b", model.peft_config["default"].copy(r=2))
    before = state(model)
    for merge in (
        lambda: merge_to_folder(model, ["default", "b"], tmp_path / "out"),
        lambda: model.merge_and_unload(adapter_names=["default", "b"]),
    ):
        with pytest.raises(AdapterError, match="each trained their own copy of lm_head"):
            merge()
    assert same_state(state(model), before) and not (tmp_path / "out").exists()


def test_a_weight_computed_from_others_is_not_merged_either(tmp_path: Path) -> None:
    base = llama()
    weight_norm(base.model.layers[1].self_attn.q_proj)
    model = loud(adapted(base, target_modules=r".*\.q_proj"))
    with pytest.raises(MergeError, match=r"^model\.layers\.1\.self_attn\.q_proj: .*WeightNorm"):
        merge_to_folder(model, "default", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_biases_go_along(tmp_path: Path) -> None:
    base = llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    model = loud(adapted(base, bias="all"))
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(model, "default", tmp_path / "live")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    for folder in ("live", "files"):
        assert_close(logits(reloaded(tmp_path / folder)), logits(model))


@pytest.mark.parametrize("live", [True, False])
def test_memory_stays_near_one_shard(live: bool, tmp_path: Path) -> None:
    base = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=6, vocab_size=1024).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="3MB")
    model: Any = loud(adapted(quantize_model(base), target_modules="all-linear", r=8))
    model.save_pretrained(tmp_path / "adapter")
    adapter = bytes_of(model.manager.parameters("default"))
    with Allocations() as counted:
        if live:
            done = merge_to_folder(model, "default", tmp_path / "out", dtype="bfloat16", max_shard_bytes=3_000_000)
        else:
            done = merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(done.shard_bytes) > 2
    assert counted.peak > 2 * 2 * 256 * 512, "the counter sees the weights"
    assert counted.peak <= 1.3 * max(done.shard_bytes) + adapter
    assert sum(done.shard_bytes) > 2 * max(done.shard_bytes)


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud(adapted(llama()))
    layer = next(iter(model.manager.layers.values()))

    def broken(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(layer.adapter("default")), "add_to_", broken)
    with pytest.raises(CheckpointError, match="no space left"):
        merge_to_folder(model, "default", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with torch.no_grad():
        model.manager.parameters("default")[0].fill_(float("nan"))
    with pytest.raises(MergeError, match="not finite"):
        merge_to_folder(model, "default", tmp_path / "out", safe_merge=True)
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    model = loud(adapted(llama()))
    merge_to_folder(model, "default", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match="already contains weights"):
        merge_to_folder(model, "default", tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(AdapterError, match="nope"):
        merge_to_folder(model, "nope", tmp_path / "new")
    with pytest.raises(AdapterError, match="has no adapters"):
        merge_to_folder(nn.Linear(2, 2), None, tmp_path / "new")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        merge_to_folder(model, None, tmp_path / "new", dtype="int8")
    impossible: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"max_shard_bytes": "5GB"}, "max_shard_bytes is '5GB'; expected a whole number of bytes"),
        (model, {"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        (model, {"adapter": []}, "no adapter to merge is named"),
        (model, {"adapter": 3}, "expected the name of an adapter or a list of names, not 3"),
        (model, {"folder": ""}, "needs a folder to be written to, not ''"),
        (model, {"folder": None}, "needs a folder to be written to, not None"),
        (5, {}, "expected a model with adapters or the folder of a base, not 5"),
    ]
    for given, changes, message in impossible:
        with pytest.raises((AdapterError, ConfigError), match=message):
            merge_to_folder(given, **{"adapter": None, "folder": tmp_path / "new", **changes})
    with pytest.raises(ConfigError, match="folder of a saved adapter"):
        merge_to_folder(tmp_path / "out", None, tmp_path / "new")
    with pytest.raises(CheckpointNotFoundError):
        merge_to_folder(tmp_path, tmp_path / "adapter", tmp_path / "new")
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged: unmerge before merging into a copy"):
        merge_to_folder(model, None, tmp_path / "new")
    fresh = loud(adapted(llama(tie_word_embeddings=True), target_modules=["embed_tokens"]))
    fresh.save_pretrained(tmp_path / "adapter")
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(MergeError, match="once for several uses"):
        merge_to_folder(tmp_path / "tied", tmp_path / "adapter", tmp_path / "new")
    with pytest.raises(MergeError, match="once for several uses"):
        merge_to_folder(fresh, None, tmp_path / "new", base=tmp_path / "tied")
    assert not (tmp_path / "new").exists()


def test_what_was_merged_takes_adapters_again(tmp_path: Path) -> None:
    model = loud(adapted(quantize_model(llama())))
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(model, "default", tmp_path / "out")
    again = PeftModel.from_pretrained(reloaded(tmp_path / "out"), tmp_path / "adapter")
    assert torch.isfinite(logits(again)).all()
