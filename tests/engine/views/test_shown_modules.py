"""The attributes of PEFT's layers that no adapter fills."""

from __future__ import annotations

import pytest

from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.views.shown_modules import unfilled
from nbpeft.model import LoraConfig


@pytest.mark.parametrize("name", ["lora_A", "lora_embedding_A", "scaling", "lora_dropout", "no_such_name"])
def test_settings_are_empty_only_on_a_layer_without_adapters(name: str) -> None:
    method = method_of(LoraConfig())
    alone, among = (unfilled(method, name, with_settings=value) for value in (True, False))
    assert (alone is None) == (name == "no_such_name")
    assert (among is None) == (name not in method.peft.parameters.split())
