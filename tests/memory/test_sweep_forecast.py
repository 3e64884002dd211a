"""Adapters that are trained side by side: forecast beside what such a training allocates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from nbpeft import LoraConfig, forecast, get_peft_model, sweep, train
from nbpeft.errors import ConfigError
from tests.memory.measured_peak import SHAPES, allocated_peak


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tokens", "adapters"), [(1, 32, 4), (2, 128, 8)], ids=["in one pass", "apart"])
def test_a_sweep_takes_what_is_forecast(rows: int, tokens: int, adapters: int) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(SHAPES["llama"]), config, adapter_name="a")
    weights = sum(part.nbytes for part in model.get_base_model().parameters())
    data = [{"input_ids": torch.randint(0, 2000, (tokens,)).tolist()} for _ in range(3 * rows)]
    rates = sweep(*(1e-4 * place for place in range(1, adapters + 1)))
    peak = weights + allocated_peak(
        lambda: train(model, data, learning_rate=rates, max_steps=3, per_device_train_batch_size=rows)
    )
    shape = {"batch_size": rows, "sequence_length": tokens, "device": "cpu"}
    assert forecast(SHAPES["llama"], config, adapters=adapters, **shape).peak_bytes == pytest.approx(peak, rel=0.05)


def test_adapters_and_optimizers_are_counted_for_each() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    shape = {"batch_size": 2, "sequence_length": 128, "device": "cpu"}
    one, four = (
        {part.name: part.byte_count for part in forecast(SHAPES["llama"], config, adapters=count, **shape).parts}
        for count in (1, 4)
    )
    assert four["base weights"] == one["base weights"]
    assert four["adapters"] == 4 * one["adapters"]
    assert four["optimizer"] == 4 * one["optimizer"]
    assert four["activations"] == one["activations"]


def test_a_number_of_adapters_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapters is 0; expected a whole number"):
        forecast(SHAPES["llama"], adapters=0)
