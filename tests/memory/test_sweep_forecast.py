"""The forecast of a sweep beside what its steps take: passes over several adapters, and one after the other."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM, TrainerCallback

from nbpeft import LoraConfig, forecast, get_peft_model, sweep, train
from tests.closeness import assert_approximates
from tests.memory.measured_peak import SHAPES, peak_of

RATES = (1e-4, 2e-4, 3e-4, 5e-4)


class SecondStep(TrainerCallback):
    """Measures the most that forward and backward of the second step allocate."""

    peak = 0

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            gc.collect()
            self._profiler.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._profiler.__exit__(None, None, None)
            self.peak = peak_of(self._profiler)


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    ("rows", "tokens", "adapters"), [(1, 32, 4), (2, 32, 4), (1, 64, 3), (4, 64, 2)], ids=["one", "two", "odd", "apart"]
)
def test_the_forecast_of_a_sweep_knows_its_passes(rows: int, tokens: int, adapters: int) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear")
    model: Any = get_peft_model(LlamaForCausalLM(SHAPES["llama"]), config, adapter_name="a")
    data = [{"input_ids": torch.randint(0, 60, (tokens,)).tolist()} for _ in range(3 * rows)]
    step, sizes = SecondStep(), {"per_device_train_batch_size": rows, "max_steps": 2}
    train(model, data, learning_rate=sweep(*RATES[:adapters]), callbacks=[step], **sizes)
    sizes = {"batch_size": rows, "max_length": tokens, "num_adapters": adapters}
    found = forecast(model.get_base_model(), config, device="cpu", **sizes)
    parts = {part.name: part.byte_count for part in found.parts}
    before = sum(parts[name] for name in ("base weights", "adapters", "optimizer"))
    assert_approximates(found.peak_bytes, before + step.peak, 0.03)
    assert_approximates(found.peak_bytes - before, step.peak, 0.1)
