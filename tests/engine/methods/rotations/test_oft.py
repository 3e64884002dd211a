"""Rotations of inputs and outputs, and the change of the weight that they amount to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.model import get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, randomize


@pytest.mark.parametrize("cayley", [False, True])
@torch.no_grad()
def test_what_it_adds_beside_other_adapters_is_its_change_of_the_weight(cayley: bool) -> None:
    config = nbpeft.OFTConfig(r=4, oft_block_size=0, target_modules=["down_proj"], use_cayley_neumann=cayley)
    model: Any = get_peft_model(llama(), config).eval()
    randomize(model, scale=0.1)
    layer = next(iter(model.manager.layers.values()))
    adapter, base = layer.adapter("default"), layer.base
    x = torch.randn(3, base.in_features)
    added = adapter(x, base.module(x), base)
    assert added.abs().max() > 1e-3
    assert_close(added, x @ adapter.delta_weight(base.weight(), base).T)
    alone = base.kind.apply(base.module, adapter.transform_input(x, base), base.weight())
    assert_close(added + base.module(x), alone)


@torch.no_grad()
def test_the_rotation_of_cayley_is_orthogonal_and_its_neumann_series_nearly() -> None:
    errors = []
    for cayley in (False, True):
        config = nbpeft.OFTConfig(r=4, oft_block_size=0, target_modules=["down_proj"], use_cayley_neumann=cayley)
        model: Any = get_peft_model(llama(), config).eval()
        randomize(model, scale=0.1)
        adapter = next(iter(model.manager.layers.values())).adapter("default")
        rotations = adapter.rotations(adapter.triangles)
        errors.append(float((rotations @ rotations.mT - torch.eye(rotations.shape[-1])).abs().max()))
    assert errors[0] < 1e-5 < errors[1]
