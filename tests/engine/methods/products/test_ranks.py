"""The rank of an adapter is that of its config, on layers of any shape; what does not fit a layer is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import get_peft_model
from tests.tiny_models import llama

HYBRID: dict[str, Any] = {"target_modules": ["0"], "r": 4, "gralora_k": 2, "hybrid_r": 3}
CORES: dict[str, Any] = {"target_modules": ["0"], "r": 2, "use_effective_conv2d": True}


@pytest.mark.parametrize(
    "config",
    [
        *(nbpeft.LoraConfig, nbpeft.HiraConfig, nbpeft.DeloraConfig, nbpeft.GraloraConfig, nbpeft.LilyConfig),
        *(nbpeft.MissConfig, nbpeft.PeanutConfig, nbpeft.PolyConfig, nbpeft.HRAConfig),
    ],
)
def test_an_adapter_knows_its_rank(config: Any) -> None:
    model: Any = get_peft_model(llama(), config(r=4, target_modules=["down_proj"]))
    layers = list(model.manager.layers.values())
    assert layers and {layer.adapter("default").rank for layer in layers} == {4}


@pytest.mark.parametrize("whole", [0, 3])
def test_the_ranks_of_gralora_are_told_apart(whole: int) -> None:
    config = nbpeft.GraloraConfig(**HYBRID | {"hybrid_r": whole})
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 12)), config)
    layer = model.base_model.model[0]
    assert (layer.r["default"], layer.gralora_k["default"], layer.hybrid_r["default"]) == (4, 2, whole)
    assert layer.adapter("default").delta_rank == 2 * 4 + whole


@pytest.mark.parametrize(
    ("layer", "config", "words"),
    [
        (nn.Linear(9, 12), nbpeft.GraloraConfig(**HYBRID), "^0: gralora_k = 2 .*9"),
        (nn.Conv3d(2, 2, 3), nbpeft.LoHaConfig(**CORES), "^0: use_effective_conv2d does not work in three dimensions"),
    ],
)
def test_what_does_not_fit_a_layer_is_refused_with_its_path(layer: nn.Module, config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        get_peft_model(nn.Sequential(layer), config)
    assert "\n" not in str(refused.value)
