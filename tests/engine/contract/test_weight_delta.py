"""The product with a change of the weight, and dropout of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.model import get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import randomize


@pytest.mark.parametrize("rescaled", [False, True])
@torch.no_grad()
def test_rows_that_are_left_keep_the_mean_if_they_are_rescaled(rescaled: bool) -> None:
    config = nbpeft.LoKrConfig(r=2, rank_dropout=0.5, rank_dropout_scale=rescaled, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8)), config).train()
    randomize(model)
    layer = next(iter(model.manager.layers.values()))
    adapter, base = layer.adapter("default"), layer.base
    parameters = [adapter.tensors[place] for place in range(len(adapter.tensors))]
    whole = adapter.delta(base, *parameters)
    for _ in range(8):
        found = adapter.delta_in_training(base)(*parameters)
        left = found.abs().amax(1) > 0
        factor = len(left) / int(left.sum()) if rescaled else 1.0
        assert_close(found, whole * left[:, None] * factor)


@pytest.mark.parametrize("config", [nbpeft.LoHaConfig, nbpeft.LoKrConfig, nbpeft.HRAConfig])
@torch.no_grad()
def test_transforms_of_torch_see_through_the_product(config: Any) -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8)), config(r=2, target_modules=["0"])).eval()
    randomize(model)
    x = torch.randn(3, 6)
    assert_close(torch.func.vmap(model)(x), model(x))
    value, tangent, *_ = torch.func.jvp(model, (x,), (x,))
    assert_close(value, model(x))
    assert_close(tangent, model(x) - model(torch.zeros_like(x)))
