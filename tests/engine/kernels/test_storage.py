"""Weights that can only be read by calling their layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbpeft.engine.kernels.storage import ReadOnlyWeight
from tests.closeness import assert_close


class ByProducts(ReadOnlyWeight):
    name = "by-products"

    def dtype(self, module: nn.Module) -> torch.dtype:
        return torch.float32


@pytest.mark.parametrize("place", ["parameter", "buffer", "none"])
def test_reading_a_weight_leaves_the_bias_where_it_is(place: str) -> None:
    layer = nn.Linear(3, 2, bias=place == "parameter")
    if place == "buffer":
        del layer._parameters["bias"]
        layer.register_buffer("bias", torch.ones(2))
    bias = layer.bias
    assert_close(ByProducts().dequantize(layer), layer.weight.detach())
    assert layer.bias is bias
