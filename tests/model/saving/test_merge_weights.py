"""The weights that a merge reads."""

from __future__ import annotations

import torch
from torch import nn

from nbpeft.model.saving.merge_weights import LiveWeights


def test_a_loaded_model_has_the_tensors_that_it_saves() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    model.register_buffer("empty", None)
    assert {spec.name for spec in LiveWeights(model).specs} == model.state_dict().keys()
