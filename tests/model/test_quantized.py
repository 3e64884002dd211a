"""Quantizing a base model while loading and in memory: same layers, same numbers, fewer bytes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nbpeft.engine.tree.model_tree import linear_layers_to_quantize
from nbpeft.errors import CheckpointNotFoundError, ConfigError
from nbpeft.model import PeftModel
from nbpeft.model.quantization.quantize import (
    load_quantized,
    quantization,
    quantize_model,
    respect_progress_bar_setting,
)
from nbpeft.model.quantization.weight_storage import stored_parts
from nbpeft.session.snapshot import Snapshots
from tests.closeness import assert_close
from tests.pretend_cpu import pretend_cpu, pretend_repacking
from tests.tiny_models import adapted, classifier, gpt2, llama, logits, same_state, state, tokens

bnb = pytest.importorskip("bitsandbytes")
KINDS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}


def quantized_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, tuple(KINDS.values()))}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_in_memory_as_transformers_does_it_while_loading(make: Any, bits: int, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, bits=bits, compute_dtype="float32")
    model = quantize_model(make(), bits=bits)
    assert quantized_paths(model) == quantized_paths(loaded)
    assert all(isinstance(model.get_submodule(path), KINDS[bits]) for path in quantized_paths(model))
    assert torch.equal(logits(model), logits(loaded))
    error = (logits(model) - logits(make())).norm() / logits(make()).norm()
    assert error < (0.2 if bits == 4 else 0.02)


@pytest.mark.parametrize("instructions", [(), ("avx512", "avx512_bf16")], ids=["without-bf16", "with-bf16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "auto", None])
def test_layers_compute_in_the_dtype_of_the_other_weights(
    asked: Any, instructions: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cpu(monkeypatch, onednn=[torch.bfloat16] if instructions else [], instructions=instructions)
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    usual = torch.bfloat16 if instructions else torch.float32
    expected = {"bfloat16": torch.bfloat16, None: usual}.get(asked, torch.float32)
    dense = LlamaForCausalLM.from_pretrained(tmp_path, dtype=expected)
    model = quantize_model(dense, quant_storage="bfloat16")
    for loaded in (load_quantized(tmp_path, dtype=asked), load_quantized(tmp_path, torch_dtype=asked), model):
        assert loaded.lm_head.weight.dtype == expected == loaded.config.quantization_config.bnb_4bit_compute_dtype
        assert {loaded.get_submodule(path).compute_dtype for path in quantized_paths(loaded)} == {expected}
        assert torch.equal(logits(model), logits(loaded))
    chosen = load_quantized(tmp_path, dtype=asked, compute_dtype="float16")
    assert {chosen.get_submodule(path).compute_dtype for path in quantized_paths(chosen)} == {torch.float16}


def test_a_quantized_checkpoint_keeps_its_compute_dtype(tmp_path: Path) -> None:
    quantize_model(llama(num_hidden_layers=1), compute_dtype="float16").save_pretrained(tmp_path)
    again = load_quantized(tmp_path, dtype="float32")
    assert {again.get_submodule(path).compute_dtype for path in quantized_paths(again)} == {torch.float16}


def test_a_quantized_model_computes_the_same_on_every_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    found = []
    for repacks in (False, True):
        pretend_repacking(monkeypatch, repacks)
        for model in (
            load_quantized(tmp_path, dtype="float32"),
            quantize_model(llama(hidden_size=64, intermediate_size=128)),
        ):
            found += [logits(model.eval()), logits(model.train())]
            model = adapted(model, init_lora_weights=True)
            found += [logits(model.eval()), logits(model.train()), logits(model.unload().eval())]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_model_of_transformers_is_repacked_again_after_unloading(
    evaluated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_repacking(monkeypatch, True)
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization(compute_dtype="float32"))
    layers = [base.get_submodule(path) for path in quantized_paths(base)]

    if evaluated:
        logits(base.eval())
    before = [[*vars(layer)] for layer in layers]
    expected = logits(copy.deepcopy(base))
    model = adapted(base, init_lora_weights=True)
    assert torch.equal(logits(model.eval()), logits(model.train()))
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    model.unload()
    assert [[*vars(layer)] for layer in layers] == before
    assert all(layer.support_avx512bf16_for_cpu and not layer._forward_pre_hooks for layer in layers)
    assert torch.equal(logits(base.eval()), expected)
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in layers)


def test_a_refused_adapter_leaves_layers_to_be_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_repacking(monkeypatch, True)
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization(compute_dtype="float32"))
    expected = logits(base.eval())
    before = [[*vars(base.get_submodule(path))] for path in quantized_paths(base)]

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nbpeft.engine.runtime.adding.commit", fails)
    with pytest.raises(KeyboardInterrupt):
        adapted(base)
    layers = [base.get_submodule(path) for path in quantized_paths(base)]
    assert [[*vars(layer)] for layer in layers] == before and all(one.support_avx512bf16_for_cpu for one in layers)
    assert all(layer.quant_state is layer.weight.quant_state for layer in layers)
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("called", [False, True])
def test_pickled_they_are_as_they_were(bits: int, called: bool) -> None:
    model = adapted(quantize_model(llama(), bits=bits))
    expected = logits(copy.deepcopy(model))
    if called:
        logits(model)
    kinds = {path: type(parameter) for path, parameter in model.named_parameters()}
    again = pickle.loads(pickle.dumps(model))
    for twin in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(logits(twin), expected)
        assert {path: type(parameter) for path, parameter in twin.named_parameters()} == kinds


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_model_keeps_in_float32_is_not_quantized(bits: int, tmp_path: Path) -> None:
    """T5 casts what goes into ``wo`` to the dtype of its weight, which would be that of the codes."""
    torch.manual_seed(0)
    config = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=128)
    dense: Any = T5ForConditionalGeneration(config).eval()
    dense.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, bits=bits, compute_dtype="float32", model_class="AutoModelForSeq2SeqLM")
    model = quantize_model(copy.deepcopy(dense), bits=bits)
    assert quantized_paths(model) == quantized_paths(loaded) and quantized_paths(model)
    assert len(linear_layers_to_quantize(dense)) == len(quantized_paths(model))
    with torch.no_grad():
        outputs = [one(input_ids=tokens(), decoder_input_ids=tokens()).logits for one in (dense, model)]
    assert (outputs[1] - outputs[0]).norm() < 0.3 * outputs[0].norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_are_never_called_are_not_quantized(bits: int, tmp_path: Path) -> None:
    dense = MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)).eval()
    dense.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, bits=bits, compute_dtype="float32")
    model = quantize_model(copy.deepcopy(dense), bits=bits)
    assert quantized_paths(model) == quantized_paths(loaded)
    assert {path.rpartition(".")[2] for path in quantized_paths(model)} == {"in_proj", "x_proj"}
    assert torch.equal(logits(model), logits(loaded))
    assert (logits(model) - logits(dense)).norm() < 0.3 * logits(dense).norm()


def test_a_model_whose_layers_cannot_be_quantized_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    dense = FalconForCausalLM(config)
    dense.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    for quantize in (lambda: quantize_model(dense), lambda: load_quantized(tmp_path)):
        with pytest.raises(ConfigError, match="FalconLinear cannot be quantized; load the model in bfloat16"):
            quantize()


def test_what_is_quantized_and_what_stays() -> None:
    model = quantize_model(llama(attention_bias=True))
    assert {path.rpartition(".")[2] for path in quantized_paths(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert type(model.lm_head) is nn.Linear
    dense = llama(attention_bias=True)
    for path in quantized_paths(model):
        old, new = dense.get_submodule(path).bias, model.get_submodule(path).bias
        assert old is new is None or torch.equal(old, new)
    assert not any(p.requires_grad for path in quantized_paths(model) for p in model.get_submodule(path).parameters())


def test_tied_weights_and_the_heads_of_task_models_stay() -> None:
    tied = quantize_model(gpt2())
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert "score" not in quantized_paths(quantize_model(classifier()))
    skipped = quantize_model(llama(), skip_modules=["down_proj", "model.layers.0.self_attn.q_proj"])
    paths = quantized_paths(skipped)
    assert not any(path.endswith("down_proj") for path in paths)
    assert "model.layers.0.self_attn.q_proj" not in paths and "model.layers.1.self_attn.q_proj" in paths


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_and_loaded_again_with_transformers(bits: int, tmp_path: Path) -> None:
    model = quantize_model(llama(), bits=bits, skip_modules=["down_proj"])
    model.save_pretrained(tmp_path)  # before a forward, which may round the constants of 4-bit weights
    again = type(model).from_pretrained(tmp_path)
    assert quantized_paths(again) == quantized_paths(model)
    assert torch.equal(logits(again.train()), logits(model.train()))


def test_shapes_that_bitsandbytes_cannot_repack_run_in_eval_mode(tmp_path: Path) -> None:
    llama(hidden_size=40, num_attention_heads=4, num_key_value_heads=1, intermediate_size=72).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, compute_dtype="float32").eval()
    assert torch.isfinite(logits(model)).all()


def test_a_gguf_file_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    class Loader:
        @staticmethod
        def from_pretrained(place: str, **options: Any) -> Any:
            asked.append((place, options.get("gguf_file")))
            assert "quantization_config" not in options
            return llama().to(options["dtype"])

    model = load_quantized(tmp_path / "tiny.gguf", model_class=Loader, compute_dtype="bf16")
    assert asked == [(str(tmp_path), "tiny.gguf")]
    assert model.is_loaded_in_4bit and len(quantized_paths(model)) == 14
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_bytes_by_part() -> None:
    big = llama(hidden_size=256, intermediate_size=512, tie_word_embeddings=True).to(torch.bfloat16)
    dense = {part.name: part for part in stored_parts(big)}
    assert "head" not in dense and dense["embedding"].share == 1.0
    parts = {part.name: part for part in stored_parts(quantize_model(big))}
    layers = parts["quantized layers"]
    assert layers.module_count == 14 and layers.kinds == ("nf4 double",)
    assert layers.bfloat16_bytes == 2 * 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert layers.share <= 0.27
    assert parts["embedding"] == dense["embedding"]
    eight = {part.name: part for part in stored_parts(quantize_model(llama(hidden_size=256), bits=8))}
    assert 0.5 < eight["quantized layers"].share < 0.53


def test_adapters_do_not_count() -> None:
    model = quantize_model(llama())
    before = stored_parts(model)
    assert stored_parts(adapted(model)) == before


def test_double_quantization_takes_less() -> None:
    sizes = [
        stored_parts(quantize_model(llama(hidden_size=256), double_quant=double))[0].byte_count
        for double in (True, False)
    ]
    assert sizes[0] < 0.98 * sizes[1]


def test_storage_and_compute_dtypes() -> None:
    layer = (
        quantize_model(llama(), quant_storage="bfloat16", compute_dtype=torch.float32, quant_type="fp4")
        .model.layers[0]
        .self_attn.q_proj
    )
    assert layer.weight.dtype == torch.bfloat16 and layer.compute_dtype == torch.float32
    assert layer.weight.quant_state.quant_type == "fp4"


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_codes_are_never_trained_whatever_they_are_stored_in(storage: str) -> None:
    model = adapted(quantize_model(llama(), quant_storage=storage), modules_to_save=["o_proj"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "o_proj" in name} == {"bias"}


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_parameters_are_counted_alike_whatever_they_are_stored_in(storage: str) -> None:
    base = llama()
    count = sum(parameter.numel() for parameter in base.parameters())
    model = adapted(quantize_model(base, quant_storage=storage))
    trained = sum(parameter.numel() for parameter in model.manager.parameters("default"))
    assert model.get_nb_trainable_parameters() == (trained, count + trained)
    shown = Snapshots().build("model", model.manager, memory=None, training=None)
    assert (shown.trainable_count, shown.parameter_count) == (trained, count + trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits is 3; expected 4 or 8"),
        ({"quant_type": "nf5"}, "quant_type is 'nf5'; expected 'nf4' or 'fp4'. Did you mean 'nf4'"),
        ({"quant_type": "fp4", "bits": 8}, "quant_type='fp4' is for 4 bits; leave it out with bits=8"),
        ({"quant_storage": "bfloat16", "bits": 8}, "quant_storage is for 4 bits; leave it out with bits=8"),
        ({"compute_dtype": "bfloat"}, "compute_dtype is 'bfloat'; .*Did you mean 'bfloat16'"),
        ({"compute_dtype": torch.int8}, "compute_dtype is torch.int8"),
        ({"quant_storage": "int4"}, "quant_storage is 'int4'"),
        ({"double_quant": "yes"}, "double_quant is 'yes'"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        quantization(**settings)
    assert "\n" not in str(caught.value) and caught.value.details["field"] == next(iter(settings))


def test_refusals_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    before = state(base)
    adapted(base)
    with pytest.raises(ConfigError, match="the model has adapters"):
        quantize_model(base)
    twice = quantize_model(copy.deepcopy(llama()))
    with pytest.raises(ConfigError, match="already quantized"):
        quantize_model(twice)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="meta device"):
        quantize_model(empty)
    with pytest.raises(ConfigError, match="no linear layer"):
        quantize_model(nn.Embedding(3, 4))
    plain = llama()
    calls = []

    def fails_late(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of memory")
        return real(*args, **options)

    real = bnb.nn.Params4bit
    monkeypatch.setattr(bnb.nn, "Params4bit", fails_late)
    with pytest.raises(RuntimeError):
        quantize_model(plain)
    assert same_state(state(plain), before) and not quantized_paths(plain)


def test_names_to_skip_are_checked() -> None:
    one = quantize_model(llama(), skip_modules="q_proj")  # type: ignore[arg-type]
    assert type(one.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    assert type(one.get_submodule("model.layers.0.self_attn.k_proj")) is not nn.Linear
    model = llama()
    with pytest.raises(ConfigError, match=r"skip_modules names 'q_prj', which is not a module.*Did you mean 'q_proj'"):
        quantize_model(model, skip_modules=["embed_tokens", "q_prj"])
    assert type(model.get_submodule("model.layers.0.self_attn.k_proj")) is nn.Linear
    for skip in (None, 5, [1], [""]):
        with pytest.raises(ConfigError, match="expected names of modules"):
            quantize_model(model, skip_modules=skip)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a model to quantize, not 'base'"):
        quantize_model("base")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not from None"):
        load_quantized(None)  # type: ignore[arg-type]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no model could be loaded") as caught:
        load_quantized(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no class 'AutoModelForPoetry'"):
        load_quantized(tmp_path, model_class="AutoModelForPoetry")
    llama().save_pretrained(tmp_path / "base")
    for wrong in (5, torch.nn.Linear):
        with pytest.raises(ConfigError, match="expected a class of transformers, or its name"):
            load_quantized(tmp_path / "base", model_class=wrong)
    with pytest.raises(ConfigError, match="cannot be loaded with these options"):
        load_quantized(tmp_path / "base", device_map=f"cuda:{torch.cuda.device_count() + 7}")
    with pytest.raises(ConfigError, match="leave it out"):
        load_quantized(tmp_path, quantization_config={})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_an_adapter_goes_to_peft_on_the_same_quantized_base_and_back(bits: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = quantize_model(llama(hidden_size=64), bits=bits)
    ours = adapted(copy.deepcopy(base), target_modules="all-linear")
    wanted = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert_close(logits(theirs), wanted)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert_close(logits(again), wanted)


def test_the_progress_bar_of_gguf_files_obeys() -> None:
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    plain: Any = reader.tqdm
    logging.disable_progress_bar()
    try:
        with respect_progress_bar_setting():
            bar: Any = reader.tqdm([1, 2])
            assert type(bar).__name__ == "EmptyTqdm" and list(bar) == [1, 2]
            logging.enable_progress_bar()
            assert isinstance(reader.tqdm([1], disable=True), plain)
    finally:
        logging.enable_progress_bar()
    assert reader.tqdm is plain
