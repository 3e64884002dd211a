"""Which low-rank product a kind of layer gets, and that every way to compute it gives the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nbpeft.engine.contract.registry import layer_kinds
from nbpeft.engine.layer_kinds.convolution import Convolution
from nbpeft.engine.layer_kinds.linear import Linear
from nbpeft.engine.methods.lora.dropout import Dropout
from nbpeft.engine.methods.lora.low_rank import (
    LowRank,
    LowRankConvolution,
    LowRankLookup,
    LowRankParameter,
    add_product_,
    low_rank_of,
)
from nbpeft.engine.methods.lora.multi_adapter import FactorBank, FactorGroups
from nbpeft.engine.methods.lora.products import adapted_linear
from nbpeft.errors import LayerKindError
from tests.closeness import assert_close


def test_each_kind_has_its_product() -> None:
    found = {kind.name: type(low_rank_of(kind)) for kind in layer_kinds()}
    convolutions = {f"convolution{count}d": LowRankConvolution for count in (1, 2, 3)}
    linear = dict.fromkeys(("linear", "conv1d", "eetq_linear", "attention"), LowRank)
    assert found == {"embedding": LowRankLookup, "parameter": LowRankParameter, **convolutions, **linear}


def test_a_kind_without_a_product_is_refused() -> None:
    class Recurrent(Convolution):
        name = "recurrent"

    class Strange:
        name, peft_name, is_linear, takes_ids = "strange", "Strange", False, False

    assert type(low_rank_of(Recurrent())) is LowRankConvolution
    with pytest.raises(LayerKindError, match="LoRA does not work on layers of the kind 'strange'"):
        low_rank_of(Strange())  # type: ignore[arg-type]


def test_the_input_goes_to_the_device_of_the_factors() -> None:
    layer, factors = nn.Linear(8, 6), (torch.empty(3, 8, device="meta"), torch.empty(6, 3, device="meta"), 1.0)
    found = low_rank_of(Linear()).forward(layer, torch.ones(5, 8), factors, Dropout(1.0, True))
    assert found.is_meta and found.shape == (5, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_factor_beyond_the_range_of_float32_merges_to_infinity(dtype: torch.dtype) -> None:
    for factor, wanted in ((1e39, math.inf), (-1e300, -math.inf), (math.nan, math.nan)):
        weight = torch.ones(3, 4, dtype=dtype)
        add_product_(weight, torch.ones(2, 4), torch.ones(3, 2), factor)
        assert torch.equal(weight.nan_to_num(7), torch.full((3, 4), wanted, dtype=dtype).nan_to_num(7))


def test_all_ways_to_compute_the_product_agree() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6).requires_grad_(False), torch.randn(5, 8)
    lora_A, lora_B = torch.rand(3, 8), torch.rand(6, 3)
    low_rank, factors, none = low_rank_of(Linear()), (lora_A, lora_B, 1.7), Dropout(0.0, False)
    wanted = (lora_B @ (lora_A @ x.T)).T * 1.7
    merged = torch.zeros(6, 8, dtype=torch.float64)
    add_product_(merged, lora_A, lora_B, 1.7)
    whole = adapted_linear(x, layer.weight, layer.bias, factors, 0.0)
    assert whole is not None
    index = torch.zeros(5, dtype=torch.long)
    found = {
        "one function": low_rank.forward(layer, x, factors, none),
        "with the layer": whole - layer(x),
        "plain operations": low_rank.compose(layer, x, factors),
        "traced": torch.func.vmap(lambda row: low_rank.forward(layer, row, factors, none))(x),
        "rows on a CPU": FactorGroups([factors]).delta(x, index),
        "rows on an accelerator": FactorBank([factors]).delta(x, index),
        "matrix": x @ low_rank.product(layer, lora_A, lora_B).T * 1.7,
        "merged": x @ merged.float().T,
    }
    for way, product in found.items():
        assert_close(product, wanted, message=way)
