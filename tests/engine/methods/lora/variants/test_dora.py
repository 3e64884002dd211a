"""The norm of a weight with its change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from tests.closeness import assert_close
from tests.tiny_models import randomize


@pytest.mark.parametrize("rest", [1e-4, 1.0])
@torch.no_grad()
def test_the_norm_is_that_of_the_sum_even_where_an_adapter_takes_the_weight_away(rest: float) -> None:
    torch.manual_seed(0)
    config = nbpeft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"])
    model: Any = nbpeft.get_peft_model(nn.Sequential(nn.Linear(64, 16)), config)
    randomize(model, scale=1.0)
    layer = next(iter(model.manager.layers.values()))
    adapter = layer.adapter("default")
    change = 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    layer.get_base_layer().weight.copy_(rest * torch.randn(16, 64) - change)
    expected = (layer.get_base_layer().weight.double() + change).norm(dim=1)
    found, size = adapter.row_norm(layer.base).double(), float(change.abs().max())
    assert_close(found, expected, depth=1, scale=size, dtype=torch.float32)
