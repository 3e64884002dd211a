"""The scaling after a hot-swap follows every rule of the new config."""

from __future__ import annotations

import math

import pytest

from nbpeft.engine.hotswap import prepare_for_hotswap, swap
from tests.engine.test_hotswap import TARGETS, config_of, fresh, manager_of, trained


def test_scalings_follow_every_rule() -> None:
    model = fresh(config_of(8))
    manager = manager_of(model)
    prepare_for_hotswap(manager)
    new = config_of(
        4, lora_alpha=6, use_rslora=True, rank_pattern={"first": 8}, alpha_pattern={"turned": 10, "first": 2}
    )
    swap(manager, "default", new, trained(new))
    scalings = {path: float(layer.adapter("default").scaling) for path, layer in manager.layers.items()}
    expected = dict.fromkeys(TARGETS, 6 / 2) | {"first": 2 / math.sqrt(8), "turned": 10 / 2}
    assert scalings == pytest.approx(expected)
