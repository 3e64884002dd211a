"""Layers that nothing can be done with are named before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbpeft import LoraConfig, get_peft_model
from nbpeft.errors import ConfigError, MergeError, TargetError


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *layers)


def unchanged(model: nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters()) and not hasattr(model, "_nbpeft_manager")


def test_lazy_layers_are_refused_whole() -> None:
    model = net(nn.LazyLinear(4))
    with pytest.raises(TargetError, match="1 is a LazyLinear that has no shape yet"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))
    assert unchanged(model) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_starting_in_a_weight_that_is_not_finite(init: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    with pytest.raises(ConfigError, match=f"0: init_lora_weights='{init}' starts in the weight, which is not finite"):
        get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=init))
    assert unchanged(model)


def test_a_weight_without_data_is_not_merged_into() -> None:
    with torch.device("meta"):
        model = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    with pytest.raises(MergeError, match="0: its weight has no data here"):
        model.merge_adapter()
    assert model.manager.merged == ()


def test_an_adapter_many_times_its_model_is_refused() -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"268,435,456 parameters, many times the model's"):
        get_peft_model(model, LoraConfig(r=2**24, target_modules=["0"]))
    assert unchanged(model)
    get_peft_model(model, LoraConfig(r=512, target_modules=["0"]))
