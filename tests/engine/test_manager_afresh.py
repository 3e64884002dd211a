"""A manager whose adapters have all been taken out and put in again."""

from __future__ import annotations

from torch import nn

from nbpeft.engine.lora_config import LoraConfig
from nbpeft.engine.manager import AdapterManager


def test_what_was_trainable_is_so_again_after_the_last_adapter_went_and_another_came() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    manager = AdapterManager.attach(model)
    config = LoraConfig(r=2, target_modules=["0"])
    for name in ("first", "second"):
        manager.add(name, config)
        assert not any(parameter.requires_grad for parameter in model[1].parameters())
        if name == "first":
            manager.remove(name)
    manager.unload(merge=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, True]
