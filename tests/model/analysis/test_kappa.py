"""KappaTune: targets by the condition numbers of weights."""

from __future__ import annotations

from typing import Any

import peft.helpers as peft_helpers
import pytest
import torch
from torch import nn

from nbpeft import KappaTuneSelector, find_kappa_target_modules, quantize_model
from tests.tiny_models import gpt2, llama, mixture


@pytest.mark.parametrize("make", [llama, gpt2, lambda: mixture("qwen3_moe"), lambda: nn.Sequential(nn.ReLU())])
@pytest.mark.parametrize(
    "asked",
    [{}, {"top_p": 0.3}, {"top_p": 0.0}, {"num_modules": 3}, {"num_modules": 3, "top_p": 0.9}, {"threshold": 40.0}],
)
def test_targets_are_those_of_peft(make: Any, asked: dict[str, Any]) -> None:
    model = make()
    ours, theirs = (kind(model, show_progress=False) for kind in (KappaTuneSelector, peft_helpers.KappaTuneSelector))
    assert ours.get_best_targets(**asked) == theirs.get_best_targets(**asked)
    assert ours.get_best_target_parameters(**asked) == theirs.get_best_target_parameters(**asked)


def test_fields_of_a_config_are_those_of_peft() -> None:
    for model in (llama(), mixture("mixtral")):
        for more in ({}, {"top_p": 0.5, "max_dim_size_to_analyze": 40}, {"moe_param_suffixes": (".down_proj",)}):
            given: dict[str, Any] = {"show_progress": False, **more}
            wanted = peft_helpers.find_kappa_target_modules(model, **given)
            assert find_kappa_target_modules(model, **given) == wanted
    assert find_kappa_target_modules(llama(), show_progress=False)["target_parameters"] is None


def test_quantized_weights_are_dequantized(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    model = quantize_model(llama(), bits=4)
    found = find_kappa_target_modules(model, top_p=1.0)
    assert "KappaTune: weights seen" in capsys.readouterr().err
    plain = llama()
    with torch.no_grad():
        for path, layer in model.named_modules():
            if hasattr(layer.weight if isinstance(layer, nn.Linear) else None, "quant_state"):
                import bitsandbytes.functional as functional

                weight: Any = layer.weight
                values = functional.dequantize_4bit(weight.data, weight.quant_state)
                plain.get_submodule(path).weight.copy_(values)
    assert found == peft_helpers.find_kappa_target_modules(plain, top_p=1.0, show_progress=False)
