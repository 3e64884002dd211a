"""The forecast of a training with two completions per row, or of a classifier, beside what its steps take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from nbpeft import LoraConfig, forecast, get_peft_model, train
from nbpeft.errors import ConfigError
from nbpeft.names import IGNORED_LABEL
from tests.closeness import assert_approximates
from tests.memory.measured_peak import SHAPES
from tests.memory.test_sweep_forecast import SecondStep

ROWS, TOKENS = 2, 64
STANDING = ("base weights", "adapters", "optimizer", "reference")


def ids() -> list[int]:
    return torch.randint(0, 60, (TOKENS,)).tolist()


def pair() -> dict[str, list[int]]:
    chosen, rejected = ids(), ids()
    labels = {f"{name}labels": [IGNORED_LABEL] * 4 + part[4:] for name, part in (("", chosen), ("rejected_", rejected))}
    return {"input_ids": chosen, "rejected_input_ids": rejected, **labels}


def test_the_forecast_of_pairs_is_that_of_twice_as_many_sequences() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear")
    model: Any = get_peft_model(LlamaForCausalLM(SHAPES["llama"]), config)
    step = SecondStep()
    data = [pair() for _ in range(3 * ROWS)]
    result = train(model, data, callbacks=[step], per_device_train_batch_size=ROWS, max_steps=2)
    assert (result.objective, result.reference) == ("dpo", "base")
    sizes: dict[str, Any] = {"batch_size": 2 * ROWS, "max_length": TOKENS, "device": "cpu"}
    found = forecast(model.get_base_model(), config, reference="base", **sizes)
    before = sum(part.byte_count for part in found.parts if part.name in STANDING)
    assert_approximates(found.peak_bytes - before, step.peak, 0.05)
    start = forecast(model.get_base_model(), config, reference="start", **sizes)
    copied = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert start.peak_bytes - found.peak_bytes == copied > 0
    with pytest.raises(ConfigError, match="reference is 1; expected 'base', 'start'"):
        forecast(model.get_base_model(), config, reference=1)  # type: ignore[arg-type]


def test_the_forecast_of_a_classifier_is_that_of_its_step() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS")
    shape = copy.deepcopy(SHAPES["llama"])
    shape.num_labels = 3
    model: Any = get_peft_model(LlamaForSequenceClassification(shape), config)
    step = SecondStep()
    data = [{"input_ids": ids(), "labels": number % 3} for number in range(6 * ROWS)]
    train(model, data, callbacks=[step], per_device_train_batch_size=2 * ROWS, max_steps=2)
    found = forecast(model.get_base_model(), config, batch_size=2 * ROWS, max_length=TOKENS, device="cpu")
    before = sum(part.byte_count for part in found.parts if part.name in STANDING)
    assert_approximates(found.peak_bytes - before, step.peak, 0.05)


def test_generation_counts_where_training_needs_less() -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"])
    shape = copy.deepcopy(SHAPES["llama"])
    shape.num_key_value_heads, shape.num_hidden_layers = shape.num_attention_heads, 64
    sizes: dict[str, Any] = {"batch_size": 4, "max_length": TOKENS, "device": "cpu"}
    for checkpointing in (False, True):
        plain, generating = (
            forecast(shape, config, generation=given, gradient_checkpointing=checkpointing, **sizes)
            for given in (False, True)
        )
        caches = [part.byte_count for part in generating.parts if part.name == "KV cache"]
        assert caches == ([2 * 64 * 4 * TOKENS * shape.hidden_size * 4] if checkpointing else [])
        assert (generating.peak_bytes > plain.peak_bytes) == checkpointing
