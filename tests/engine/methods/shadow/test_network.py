"""The sizes of a mirror of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

import nbpeft
from nbpeft.engine.methods.shadow.network import recipe_for
from tests.tiny_models import LLAMA

S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(("layers", "kinds"), [(1, [S]), (2, [S, S]), (5, [S, S, F, F, F])])
def test_layers_that_the_model_lacks_are_as_its_last(layers: int, kinds: list[str]) -> None:
    sizes: dict[str, Any] = {key: value for key, value in LLAMA.items() if key != "attention_bias"}
    with torch.device("meta"):
        model = Qwen2Model(Qwen2Config(**{**sizes, "num_hidden_layers": 3, "layer_types": [S, S, F]}))
    made = recipe_for(nbpeft.ShadowConfig(shadow_num_hidden_layers=layers), model, model)
    assert made.network_config.layer_types == kinds and made.network_config.num_hidden_layers == layers
    assert model.config.layer_types == [S, S, F]
