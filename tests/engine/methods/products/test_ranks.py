"""The rank of an adapter is that of its config, on layers of any shape."""

from __future__ import annotations

from typing import Any

import pytest

import nbpeft
from nbpeft.model import get_peft_model
from tests.tiny_models import llama


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
