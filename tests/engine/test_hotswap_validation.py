"""Validations of a swap that change adapters themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbpeft.engine.hotswap import swap
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import HotSwapError
from tests.engine.test_hotswap import IDS, assert_untouched, config_of, fresh, manager_of, tensors_of, trained


def slot_config(rank: int) -> LoraConfig:
    """One that can be merged."""
    return config_of(rank, target_modules=["embed", "conv", "first", "turned"])


MEDDLING: dict[str, Callable[[Any], object]] = {
    "switches": lambda manager: manager.activate("other"),
    "switches off": lambda manager: manager.disable(),
    "scales": lambda manager: manager.set_scale("default", 0.5),
    "merges": lambda manager: manager.merge(),
    "swaps": lambda manager: swap(manager, "default", slot_config(4), trained(slot_config(4), seed=7)),
    "renames": lambda manager: manager.rename("default", "moved"),
    "deletes": lambda manager: manager.remove("default"),
    "unloads": lambda manager: manager.unload(merge=False),
}


@pytest.mark.filterwarnings("ignore:adapters are merged")
@pytest.mark.parametrize("meddling", MEDDLING)
@pytest.mark.parametrize("active", ["default", "other"])
def test_a_validation_that_changes_adapters_and_refuses(meddling: str, active: str) -> None:
    old = slot_config(2)
    model = fresh(old, trained(old))
    manager = manager_of(model)
    manager.add("other", slot_config(4), trained(slot_config(4), seed=5))
    manager.activate(active)
    before, output, kept = tensors_of(model), model(IDS), manager.configs["default"]
    with pytest.raises(HotSwapError, match=r"did not pass its validation|block is open"):
        swap(
            manager,
            "default",
            slot_config(4),
            trained(slot_config(4), seed=3),
            grow=True,
            validate=lambda: MEDDLING[meddling](manager) is not manager and False,
        )
    assert manager.configs["default"] is kept and manager.alive
    assert set(manager.configs) == {key for layer in manager.layers.values() for key in layer.adapters}
    assert_untouched(model, before)
    assert manager.active == (active,) and manager.enabled and not manager.merged and manager.scale("default") == 1.0
    assert torch.equal(model(IDS), output)
