from __future__ import annotations

import copy
import re
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen2Config,
    T5Config,
    ViTConfig,
    ViTModel,
    WhisperConfig,
)

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.init_configs import INIT_CONFIGS
from nbpeft.engine.methods.lora.initialization import loftq
from nbpeft.engine.methods.prompts.adaption_prompt import AdaptionPromptConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import MANAGER, manager_of
from nbpeft.errors import ConfigError, TargetError
from nbpeft.memory import estimate, forecast, measure
from nbpeft.memory.allocations import fake_tensors
from nbpeft.memory.architecture import architecture_of
from nbpeft.memory.estimate import run_step
from nbpeft.memory.fake_quantized import quantized_bytes
from nbpeft.memory.forecast import device_bytes
from nbpeft.memory.optimizers import state_bytes
from nbpeft.model import quantize_model
from nbpeft.names import OPTIMIZERS
from tests.tiny_models import llama

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


WIDTHS: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def lora(**options):
    settings: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    return LoraConfig(**settings)


def parts(found):
    return {part.name: part.byte_count for part in found.parts}


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_weights_and_adapters_are_exact(options):
    adapter = lora(**options)
    found = parts(forecast(CONFIG, adapter))
    model = LlamaForCausalLM(CONFIG)
    AdapterManager.attach(model).add("one", adapter)
    real = {part.name: part.byte_count for part in measure(model).parts}
    assert found["base weights"] == real["base weights"]
    assert found["adapters"] == real["adapters"]


def test_parts_add_up():
    for training in (True, False):
        found = forecast(CONFIG, lora(), training=training, batch_size=2)
        assert found.peak_bytes == sum(part.byte_count for part in found.parts)
        assert all(part.byte_count >= 0 for part in found.parts)


@pytest.mark.slow
def test_less_is_needed_for_a_loss_in_chunks():
    settings = {"batch_size": 4, "max_length": 64, "gradient_checkpointing": True}
    config = copy.deepcopy(CONFIG)
    config.vocab_size = 8192
    sizes = (0, 128, 64)
    peaks = [forecast(config, lora(), loss_chunk_size=size, **settings).peak_bytes for size in sizes]
    logits = 4 * 64 * config.vocab_size * 4
    assert peaks[0] - peaks[1] > logits
    assert peaks[1] - peaks[2] > logits / 5
    whole = forecast(config, lora(), loss_chunk_size=0, **settings)
    assert any(suggestion.change == "loss_chunk_size=128" for suggestion in whole.suggestions)
    with pytest.raises(ConfigError, match="loss_chunk_size must be"):
        forecast(CONFIG, lora(), loss_chunk_size=-1)


@pytest.mark.parametrize(("length", "size"), [(96, 16), (95, 16), (33, 16), (16, 16), (8, 16)])
def test_chunks_of_the_loss_that_are_skipped_change_nothing(monkeypatch, length, size):
    setting = forecast(CONFIG, lora(), batch_size=1, max_length=length, loss_chunk_size=size).setting
    sampled = run_step(setting)
    real = estimate.chunked_head
    monkeypatch.setattr(estimate, "chunked_head", lambda model, size, sampled: real(model, size))
    assert run_step(setting) == sampled


def test_a_resolved_config_warns_of_no_missing_layer_in_another_thread():
    model = LlamaForCausalLM(CONFIG)
    AdapterManager.attach(model).add("default", lora(target_modules="all-linear"))
    config = manager_of(model).configs["default"]
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        worker = threading.Thread(target=lambda: found.append(forecast(model, config, max_length=24)))
        worker.start()
        worker.join()
    assert found and not [one for one in told if "not found" in str(one.message)]


@pytest.mark.slow
def test_few_layers_tell_what_many_take():
    for changes in ({}, {"gradient_checkpointing": True}, {"training": False}, {"quantization": "nf4"}):
        found = forecast(CONFIG, lora(lora_dropout=0.1), batch_size=2, max_length=48, **changes)
        whole = run_step(found.setting)
        step = found.peak_bytes - sum(parts(found)[name] for name in ("base weights", "adapters"))
        assert step - parts(found).get("optimizer", 0) == whole.total


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (GPT2Config(n_embd=64, n_layer=6, n_head=2, vocab_size=256), {}),
        (MistralConfig(**WIDTHS, sliding_window=16), {}),
        (Gemma2Config(**WIDTHS, head_dim=32, sliding_window=16), {"gradient_checkpointing": True}),
        (Qwen2Config(**WIDTHS), {"quantization": "int8", "gradient_checkpointing": True}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_freed_before_backward_or_kept_beyond_it_counts(config, changes):
    """A cache goes before backward begins; 8-bit inputs that checkpointing cannot drop stay until its end."""
    changes = changes | {"loss_chunk_size": 0}  # with logits as a whole the peak is in backward
    found = forecast(config, lora(target_modules="all-linear"), batch_size=3, max_length=48, **changes)
    step = found.peak_bytes - sum(parts(found)[name] for name in ("base weights", "adapters", "optimizer"))
    assert step == run_step(found.setting).total


@pytest.mark.drawn(1)
@pytest.mark.parametrize("layers", [[0, 5], [1, 3, 5], [0, 1, 2]])
def test_an_adapter_on_some_layers_is_counted_on_those(layers):
    adapter = lora(target_modules=["q_proj", "down_proj"], layers_to_transform=layers, lora_dropout=0.1)
    found = forecast(CONFIG, adapter, batch_size=2, max_length=48)
    whole = run_step(found.setting)
    step = found.peak_bytes - sum(parts(found)[name] for name in ("base weights", "adapters", "optimizer"))
    assert step == whole.total


@pytest.mark.drawn(1)
@pytest.mark.parametrize("layers", [2, 6])
def test_prompts_in_the_last_layers_are_counted_there(layers):
    adapter = AdaptionPromptConfig(adapter_len=4, adapter_layers=layers, task_type="CAUSAL_LM")
    found = forecast(CONFIG, adapter, batch_size=2, max_length=48)
    step = found.peak_bytes - sum(parts(found)[name] for name in ("base weights", "adapters", "optimizer"))
    assert step == run_step(found.setting).total


@pytest.mark.slow
def test_the_end_of_backward_can_be_the_peak():
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = 12
    found = forecast(config, lora(r=64), batch_size=1, max_length=8, gradient_checkpointing=True, optim="sgd")
    whole = run_step(found.setting)
    assert parts(found)["gradients"] > 0.8 * parts(found)["adapters"]
    step = found.peak_bytes - sum(parts(found)[name] for name in ("base weights", "adapters"))
    assert abs(step - whole.total) < 0.02 * found.peak_bytes


def test_from_a_model_with_adapters_and_a_handle():
    model = LlamaForCausalLM(CONFIG)
    expected = forecast(CONFIG, lora()).peak_bytes
    assert forecast(model, lora()).peak_bytes == expected
    AdapterManager.attach(model).add("one", lora(r=2))
    handle = nn.Module()
    handle.__dict__[MANAGER] = manager_of(model)
    assert forecast(handle, lora()).peak_bytes == expected
    assert next(model.parameters()).device.type == "cpu"


def test_a_suggested_quantization_brings_its_gradient_checkpointing():
    how: dict[str, Any] = {"batch_size": 2, "max_length": 128}
    asked = forecast(CONFIG, lora(), device="4GB", **how)
    suggested = next(one for one in asked.suggestions if one.change == "bits=4")
    assert suggested.peak_bytes == forecast(CONFIG, lora(), quantization="nf4", **how).peak_bytes
    assert (
        suggested.peak_bytes
        < forecast(CONFIG, lora(), quantization="nf4", gradient_checkpointing=False, **how).peak_bytes
    )


def test_other_heads_and_encoder_decoders():
    config = copy.deepcopy(CONFIG)
    config.pad_token_id = 0
    classifier = LlamaForSequenceClassification(config)
    assert parts(forecast(classifier, lora(task_type="SEQ_CLS")))["activations"] > 0
    classifier.__class__ = type("OwnName", (LlamaForSequenceClassification,), {})
    assert architecture_of(classifier, None).auto_class == "AutoModelForSequenceClassification"
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=128)
    found = forecast(t5, LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    assert parts(found)["activations"] > 0


@pytest.mark.slow
def test_directions():
    plain = forecast(CONFIG, lora(), batch_size=4, max_length=128)
    same: dict[str, Any] = {"batch_size": 4, "max_length": 128}
    assert forecast(CONFIG, lora(), gradient_checkpointing=True, **same).peak_bytes < plain.peak_bytes
    assert forecast(CONFIG, lora(), quantization="nf4", **same).peak_bytes < plain.peak_bytes
    assert forecast(CONFIG, lora(), dtype="bfloat16", **same).peak_bytes < plain.peak_bytes
    assert forecast(CONFIG, lora(r=64), **same).peak_bytes > plain.peak_bytes
    assert forecast(CONFIG, lora(), training=False, **same).peak_bytes < plain.peak_bytes
    assert forecast(CONFIG, None, **same).peak_bytes > plain.peak_bytes


@pytest.mark.slow
def test_a_model_far_larger_than_this_machine():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    found = forecast(
        config,
        lora(r=16),
        batch_size=1,
        max_length=512,
        dtype="bfloat16",
        quantization="nf4",
        gradient_checkpointing=True,
    )
    weights = parts(found)["base weights"]
    linear = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert 0 < weights - linear * 0.5158 - 2 * 2 * 128256 * 8192 < 1e8
    assert weights < found.peak_bytes < 1.3 * weights


@pytest.mark.slow
def test_suggestions_make_it_fit():
    found = forecast(CONFIG, lora(), batch_size=8, max_length=128, device="20MB")
    assert found.fits is False
    assert "does not fit 20.0 MB" in str(found)
    suggestions = found.suggestions
    assert {one.change.split("=")[0].split(" ")[0] for one in suggestions} >= {
        "gradient_checkpointing", "batch_size", "max_length", "dtype",
    }  # fmt: skip
    for one in suggestions:
        assert one.saved_bytes > 0
        assert one.peak_bytes == found.peak_bytes - one.saved_bytes
        assert one.fits == (one.peak_bytes <= 20_000_000)
        assert str(one).startswith(one.change)
    best = next(one for one in suggestions if one.change.startswith("batch_size 8 -> "))
    size = int(best.change.rpartition(" ")[2])
    assert best.peak_bytes == forecast(CONFIG, lora(), batch_size=size, max_length=128).peak_bytes
    assert forecast(CONFIG, lora(), batch_size=size + 1, max_length=128, device="20MB").fits is False


@pytest.mark.slow
def test_smaller_batches_of_completions_are_divisors_so_that_groups_stay_whole():
    config = LlamaConfig(**WIDTHS | {"num_hidden_layers": 1})
    asked: dict[str, Any] = {"max_length": 32, "generation": True}
    limit = forecast(config, lora(), batch_size=7, **asked).peak_bytes
    found = forecast(config, lora(), batch_size=12, device=limit, **asked)
    batches = [change for one in found.suggestions for change in re.findall(r"batch_size 12 -> \d+", one.change)]
    assert "batch_size 12 -> 6" in batches and "batch_size 12 -> 7" not in batches


@pytest.mark.slow
def test_changes_together_go_no_further_than_they_must():
    asked: dict[str, Any] = {"batch_size": 4, "max_length": 1024, "dtype": "float32"}
    less: dict[str, Any] = {
        "batch_size": 1,
        "max_length": 320,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
    limit = forecast(CONFIG, lora(r=4), **less).peak_bytes
    together = forecast(CONFIG, lora(r=4), device=limit, **asked).suggestions[0]
    assert together.fits and together.peak_bytes <= limit
    lengths = re.search(r"max_length 1024 -> (\d+)", together.change)
    assert lengths is not None, together.change
    reached: dict[str, Any] = {
        "batch_size": 1 if "batch_size 4 -> 1" in together.change else 4,
        "dtype": "bfloat16" if "bfloat16" in together.change else "float32",
        "gradient_checkpointing": "gradient_checkpointing" in together.change or "bits=4" in together.change,
        "quantization": "nf4" if "bits=4" in together.change else None,
        "optim": "adamw_8bit" if "adamw_8bit" in together.change else "adamw",
    }
    exact = forecast(CONFIG, lora(r=4), max_length=int(lengths[1]), **reached)
    longer = forecast(CONFIG, lora(r=4), max_length=int(lengths[1]) + 64, **reached)
    assert exact.peak_bytes == together.peak_bytes and longer.peak_bytes > limit


@pytest.mark.slow
def test_changes_together_where_none_is_enough():
    found = forecast(CONFIG, lora(r=4), batch_size=8, max_length=256, device="2.6MB")
    assert not any(one.fits for one in found.suggestions[1:])
    together = found.suggestions[0]
    assert together.fits
    assert together.change.startswith("gradient_checkpointing=True, dtype float32 -> bfloat16, batch_size 8 -> ")
    assert forecast(CONFIG, lora(r=4), device="300kB").suggestions[0].fits is False
    assert "<table" in found._repr_html_()


def test_quantized_bytes_are_those_of_the_library():
    bnb: Any = pytest.importorskip("bitsandbytes")
    for double in (False, True):
        layer = bnb.nn.Linear4bit(192, 80, bias=False, quant_type="nf4", compress_statistics=double).to("cpu")
        real = sum({part.byte_count for part in measure(nn.Sequential(layer)).parts if part.name == "base weights"})
        assert quantized_bytes(nn.Linear(192, 80), "nf4", double=double) == real
    layer = bnb.nn.Linear8bitLt(192, 80, bias=False, has_fp16_weights=False).to("cpu")
    real = next(part.byte_count for part in measure(nn.Sequential(layer)).parts)
    assert quantized_bytes(nn.Linear(192, 80), "int8", double=False) == real


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
        ("sgd_momentum", lambda parameters: torch.optim.SGD(parameters, momentum=0.9)),
    ],
)
def test_optimizer_state(name, make):
    layer = nn.Linear(32, 16)
    optimizer = make(layer.parameters())
    layer(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    real = next(part.byte_count for part in measure(layer, optimizer).parts if part.name == "optimizer")
    assert state_bytes(name, [((16, 32), 4), ((16,), 4)]) == real


def test_names_of_training_arguments_and_those_that_are_offered():
    arguments = ("adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "adafactor")
    for name in (*arguments, *OPTIMIZERS):
        assert forecast(CONFIG, lora(), optim=name).peak_bytes > 0


def test_sizes():
    assert device_bytes("16GB") == 16 * 10**9
    assert device_bytes("1.5 GiB") == int(1.5 * 2**30)
    assert device_bytes("800m") == 8 * 10**8
    assert device_bytes(5) == 5
    assert device_bytes(None) is None
    total = device_bytes("cpu")
    assert total is not None and total > 2**28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "nf5"}, "nf4"),
        ({"optim": "adamv"}, "Did you mean 'adam' or 'adamw'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1.5}, "max_length is 1.5"),
        ({"dtype": "int8"}, "floating-point dtype"),
        ({"dtype": "float8_e4m3fn"}, "floating-point dtype"),
        ({"device": "big"}, "16GB"),
        ({"device": "1.5.3GB"}, "16GB"),
        ({"device": -5}, "16GB"),
        ({"device": 0}, "16GB"),
        ({"device": True}, "16GB"),
        ({"device": object()}, "16GB"),
        ({"batch_size": True}, "batch_size is True"),
        ({"quantization": 4}, "quantization 4 is not one of"),
        ({"optim": None}, "optimizer None is not one of"),
        ({"training": "no"}, "training is 'no'; expected True or False"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        forecast(CONFIG, lora(), **arguments)


def test_what_cannot_be_forecast():
    with pytest.raises(ConfigError, match="Linear"):
        forecast(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="dict"):
        forecast({})
    with pytest.raises(TargetError, match="q_prj"):
        forecast(CONFIG, lora(target_modules=["q_prj"]))
    for config in (ViTConfig(), WhisperConfig()):
        with pytest.raises(ConfigError, match=f"no AutoModelFor.* for a {type(config).__name__}, so its inputs"):
            forecast(config, lora())
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ConfigError, match="ViTModel: its input is pixel_values; only text models are supported"):
        forecast(ViTModel(small), lora(target_modules="all-linear"))
    for adapter in ({"r": 8}, "lora", 3):
        with pytest.raises(ConfigError, match="the adapter must be given as a config"):
            forecast(CONFIG, adapter)


def test_too_many_tokens_for_the_positions_of_the_model(caplog):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    config.max_position_embeddings = 16
    adapter = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="max_length 32 exceeds its 16 positions"):
        forecast(config, adapter, max_length=32)
    assert not caplog.records
    assert forecast(config, adapter, max_length=16).peak_bytes > 0


def test_modules_to_save_are_copied_without_the_fake_tensor_mode():
    """Two modes at once end in memory that is freed twice, long after."""
    with fake_tensors():
        model: Any = LlamaForCausalLM(CONFIG)
        config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        manager = AdapterManager.attach(model)
        manager.add("a", config)
        modes = {id(parameter.fake_mode) for parameter in model.parameters()}
    assert len(modes) == 1 and len(manager.copies) == 2
    assert all(parameter.requires_grad for parameter in manager.parameters("a"))


@pytest.mark.slow
def test_suggestions_for_a_model_with_few_positions():
    config = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    adapter = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    found = forecast(config, adapter, batch_size=8, max_length=128, device="1MB")
    assert [one for one in found.suggestions if one.change == "batch_size 8 -> 4"]


@pytest.mark.slow
def test_a_model_without_gradient_checkpointing():
    config = OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    adapter = lora(target_modules=["c_attn"])
    with pytest.raises(ConfigError, match="OpenAIGPTLMHeadModel does not support gradient checkpointing"):
        forecast(config, adapter, max_length=64, gradient_checkpointing=True)
    found = forecast(config, adapter, batch_size=8, max_length=64, device="600KB")
    assert found.fits is False and found.suggestions
    assert not any("gradient_checkpointing" in one.change for one in found.suggestions)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("settings", [{}, {"quant_type": "fp4", "double_quant": False}, {"bits": 8}])
def test_a_quantized_model_and_its_config_are_foreseen_as_they_are_stored(settings):
    model = quantize_model(LlamaForCausalLM(copy.deepcopy(CONFIG)), **settings)  # the model's config becomes quantized
    kind = "int8" if settings.get("bits") == 8 else settings.get("quant_type", "nf4")
    how: dict[str, Any] = {"gradient_checkpointing": False}
    wanted = forecast(CONFIG, lora(), quantization=kind, double_quant=settings.get("double_quant", True), **how)
    for source in (model, model.config, torch.compile(model, backend="eager")):
        assert parts(forecast(source, lora(), **how)) == parts(wanted)
    stored = next(part.byte_count for part in measure(model).parts if part.name == "base weights")
    assert abs(parts(wanted)["base weights"] - stored) < 0.01 * stored


def test_a_transposed_layer_is_counted_as_it_is_quantized():
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
    wanted = parts(forecast(model.config, lora(), quantization="int8"))["base weights"]
    stored = next(part.byte_count for part in measure(quantize_model(model, bits=8)).parts)
    assert wanted == stored


@pytest.mark.slow
def test_beside_the_main_thread_nothing_that_all_threads_share_changes():
    config = LlamaConfig(**(CONFIG.to_dict() | {"intermediate_size": 320}))
    adapter = lora(lora_dropout=0.1)
    settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_checkpointing": True}
    seen, done, found = set(), threading.Event(), []

    def work() -> None:
        found.append(forecast(config, adapter, **settings))
        done.set()

    torch.manual_seed(3)
    state = torch.get_rng_state()
    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.002):
        seen.add(torch.get_default_dtype())
    thread.join()
    assert seen == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)
    whole = run_step(found[0].setting)
    step = found[0].peak_bytes - sum(parts(found[0])[name] for name in ("base weights", "adapters", "optimizer"))
    assert step == whole.total


def test_an_adapter_that_names_every_layer_is_forecast_from_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a model in memory does: ``all-linear`` has become the layers' paths."""
    paths = [f"model.layers.{number}.self_attn.q_proj" for number in range(CONFIG.num_hidden_layers)]
    expected = forecast(CONFIG, lora(target_modules=["q_proj"]), batch_size=2, max_length=40)
    monkeypatch.setattr("nbpeft.memory.estimate.run_step", lambda setting: pytest.fail("the whole model was run"))
    found = forecast(CONFIG, lora(target_modules=paths), batch_size=2, max_length=40)
    assert found.parts == expected.parts


@pytest.mark.drawn(2)
@pytest.mark.parametrize("init", INIT_CONFIGS)
def test_inits_that_need_data_or_a_quantizer_are_estimated_without(init: str) -> None:
    field, settings = INIT_CONFIGS[init]
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, **{field: settings()})
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    found, before = (
        next(part.byte_count for part in forecast(llama(), one).parts if part.name == "adapters")
        for one in (config, plain)
    )
    assert found == before * (2 if config.initialised_from_data else 1)
    # Nothing of the forecast is left in a cache.
    assert type(loftq.quantize(torch.ones(1, 64), 4).dequantize()) is torch.Tensor


def test_each_optimizer_of_transformers_has_a_size() -> None:
    from transformers.training_args import OptimizerNames

    from nbpeft.memory.optimizers import state_bytes

    sizes = {item.value: state_bytes(item.value, [((512, 64), 4)]) for item in OptimizerNames}
    whole = 512 * 64 * 4
    assert sizes["adamw_torch_8bit"] < whole < sizes["adamw_torch"] == sizes["galore_adamw_layerwise"] < 2 * whole + 9
    assert sizes["lomo"] == 0 and 3 * whole <= sizes["paged_ademamix_32bit"] < 3 * whole + 9
