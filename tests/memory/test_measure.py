from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.memory import Meter, SavedTensors, measure, weights_by_kind
from tests.tiny_models import VOCABULARY, config, llama


def add_adapter(model, name="sql", **options):
    manager = AdapterManager.attach(model)
    manager.add(name, config(**options))
    return manager


def parts(state):
    return {part.name: part.byte_count for part in state.parts}


def batch():
    return {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}


def buffers(model):
    return sum(buffer.nbytes for buffer in model.buffers())


def test_base_weights_and_tied_ones_once():
    tied = llama(tie_word_embeddings=True)
    loose = llama(tie_word_embeddings=False)
    assert parts(measure(loose))["base weights"] - parts(measure(tied))["base weights"] == VOCABULARY * 32 * 4
    expected = sum(parameter.nbytes for parameter in tied.parameters()) + buffers(tied)
    assert parts(measure(tied))["base weights"] == expected


def test_adapters_gradients_and_optimizer():
    model = llama()
    base = parts(measure(model))["base weights"]
    manager = add_adapter(model)
    add_adapter(model, "chat", r=2)
    count = {name: sum(p.numel() for p in manager.parameters(name)) for name in ("sql", "chat")}
    optimizer = torch.optim.AdamW(manager.parameters("sql"))
    state = measure(model, optimizer)
    assert parts(state) | {"other": 0} == {
        "base weights": base, "adapters": 4 * sum(count.values()), "gradients": 0, "optimizer": 0, "other": 0,
    }  # fmt: skip
    assert state.parts[1].detail == "sql, chat"
    model(**batch()).loss.backward()
    optimizer.step()
    found = parts(measure(model, optimizer))
    assert found["base weights"] == base
    assert found["gradients"] == 4 * count["sql"]
    # AdamW keeps two moments and one float step a parameter.
    assert found["optimizer"] == 8 * count["sql"] + 4 * len(manager.parameters("sql"))
    optimizer.zero_grad()
    assert parts(measure(model, optimizer))["gradients"] == 0


def test_trained_copies_are_adapters():
    model = llama(tie_word_embeddings=False)
    base = parts(measure(model))["base weights"]
    add_adapter(model, modules_to_save=["lm_head"])
    found = parts(measure(model))
    assert found["base weights"] == base
    assert found["adapters"] == 4 * (VOCABULARY * 32 + 2 * 4 * (32 + 32 + 32 + 16))


def test_what_an_adapter_keeps_of_its_start_is_its_own():
    model = llama()
    base = parts(measure(model))["base weights"]
    manager = add_adapter(model, init_lora_weights="pissa")
    found = parts(measure(model))
    assert found["base weights"] == base
    assert found["adapters"] == 2 * 4 * sum(p.numel() for p in manager.parameters("sql"))


def test_full_training_counts_all_gradients():
    model = llama()
    model(**batch()).loss.backward()
    assert parts(measure(model))["gradients"] == sum(parameter.nbytes for parameter in model.parameters())


def test_kinds():
    model = llama().to(torch.bfloat16)
    model.lm_head.float()
    kinds = weights_by_kind(model)
    assert set(kinds) == {"bf16", "fp32"}
    assert sum(kinds.values()) == parts(measure(model))["base weights"]
    assert "bf16" in measure(model).parts[0].detail


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_quantized_weights_count_with_their_constants(double, adapters):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(
        bnb.nn.Linear4bit(128, 64, bias=True, quant_type="nf4", compress_statistics=double),
        bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False),
    ).to("cpu")
    if adapters:
        add_adapter(model, target_modules=["0"])
    blocks = 128 * 64 // 64
    four_bit = 128 * 64 // 2 + 16 * 4 + (blocks + 4 + 256 * 4 + 4 if double else blocks * 4)
    label = "nf4 double" if double else "nf4"
    assert weights_by_kind(model) == {label: four_bit, "int8": 64 * 32 + 32 * 4, "fp32": 64 * 4}


def test_activations():
    model = llama()
    add_adapter(model)
    with SavedTensors(model) as saved:
        loss = model(**batch()).loss
    assert parts(measure(model, saved=saved))["activations"] == saved.byte_count > 0
    loss.backward()
    assert parts(measure(model, saved=saved))["activations"] == 0


def test_key_value_cache():
    model = llama()
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8), layer)
    assert parts(measure(model, cache=cache))["KV cache"] == 2 * 2 * (2 * 2 * 6 * 8) * 4


def test_meta_model_takes_nothing():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    assert parts(measure(model)) == {"base weights": 0, "adapters": 0, "gradients": 0, "optimizer": 0}


def test_parts_and_other_make_up_the_process():
    state = measure(llama())
    assert state.device == "cpu"
    if any(part.name == "other" for part in state.parts):
        assert sum(part.byte_count for part in state.parts) > 2**26
    assert state.device_total is not None


def test_a_meter_sees_changes_and_keeps_nothing_alive():
    model = llama()
    meter = Meter(model)
    before = parts(meter.read())
    assert before["adapters"] == 0
    manager = add_adapter(model)
    assert parts(meter.read())["adapters"] > 0
    reference = weakref.ref(manager.layers["model.layers.0.self_attn.q_proj"].adapter("sql").lora_A)
    manager.remove("sql")
    gc.collect()
    assert reference() is None
    assert parts(meter.read())["adapters"] == 0
    gone = weakref.ref(model)
    del model, manager
    gc.collect()
    assert gone() is None
    assert parts(meter.read())["base weights"] == 0


def test_an_optimizer_is_found_by_its_steps() -> None:
    model = nn.Linear(16, 16)
    other = nn.Linear(8, 8)
    meter = Meter(model)
    optimizers = [torch.optim.AdamW(part.parameters()) for part in (model, other)]
    parts = {part.name: part.byte_count for part in meter.read().parts}
    assert parts["optimizer"] == 0
    for part, optimizer in zip((model, other), optimizers, strict=True):
        part(torch.ones(1, part.in_features)).sum().backward()
        optimizer.step()
    parts = {part.name: part.byte_count for part in meter.read().parts}
    two_moments = 2 * 4 * (16 * 16 + 16)
    assert two_moments <= parts["optimizer"] < two_moments + 100
    assert {part.name: part.byte_count for part in Meter(model).read().parts}["optimizer"] == parts["optimizer"]
