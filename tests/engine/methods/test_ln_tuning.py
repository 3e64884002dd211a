"""LN tuning beside other methods, and on what is no norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.errors import ConfigError, TargetError
from nbpeft.model import get_peft_model
from tests.tiny_models import llama, logits, randomize


def test_norms_take_no_other_method_and_linear_layers_not_this_one() -> None:
    model = get_peft_model(llama(), nbpeft.LNTuningConfig())
    with pytest.raises(TargetError, match="LlamaRMSNorm, which cannot be adapted"):
        model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["norm"]))
    with pytest.raises((TargetError, ConfigError), match="Linear, which cannot be adapted by LN tuning"):
        model.add_adapter("ln", nbpeft.LNTuningConfig(target_modules=["q_proj"]))


def test_the_norm_runs_once_and_its_own_weight_stays() -> None:
    model = get_peft_model(llama(), nbpeft.LNTuningConfig())
    randomize(model, scale=0.1)
    layer: Any = model.base_model.model.model.norm
    weight = layer.base_layer.weight.clone()
    calls = []
    layer.register_forward_hook(lambda *given: calls.append(given))
    changed = logits(model.eval())
    assert len(calls) == 1 and torch.equal(layer.base_layer.weight, weight)
    model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])  # now as a difference that is added
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-4)
    assert not torch.equal(both, changed)
