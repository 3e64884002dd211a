"""What an adapter takes from its config."""

from __future__ import annotations

import pytest
from torch import nn

from nbpeft import LoraConfig, get_peft_model
from nbpeft.engine.contract.adapter import is_configured

SETTINGS = {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}


@pytest.mark.parametrize(
    ("changes", "same"),
    [({}, True), ({"lora_alpha": 8}, False), ({"lora_dropout": 0.5}, False), ({"use_rslora": True}, False)],
    ids=str,
)
def test_an_adapter_has_the_settings_of_its_config_alone(changes: dict[str, object], same: bool) -> None:
    manager = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(**SETTINGS)).manager
    adapter = manager.layers["0"].adapter("default")
    assert is_configured(adapter, LoraConfig(**{**SETTINGS, **changes}), "0") is same
