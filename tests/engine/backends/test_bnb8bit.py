from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nbpeft.engine.backends.bnb8bit import Bnb8bit
from tests.closeness import assert_approximates, assert_close
from tests.engine.backends.support import backend_name, check_grid_of_larger_weight, error, evaluate

bnb = pytest.importorskip("bitsandbytes")
backend = Bnb8bit()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (5, 7), (33, 65), (1, 3)]


def quantized(out_features=64, in_features=128, *, bias=False, threshold=0.0, seed=0):
    torch.manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias=bias)
    layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu"), dense.weight.detach().clone()


def inputs(layer, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(5, layer.in_features).to(dtype)


def train_step(layer, x):
    layer.train()
    x = x.clone().requires_grad_()
    layer(x).float().square().sum().backward()
    return x.grad


FORWARDS = {
    "fresh": lambda layer: None,
    "after_eval": lambda layer: evaluate(layer, inputs(layer)),
    "after_training": lambda layer: train_step(layer, inputs(layer)),
    "after_state_dict": lambda layer: layer.state_dict(),
}
forwards = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())


@forwards
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_at_any_time(forward, shape):
    layer, weight = quantized(*shape)
    assert backend_name(layer) == "bnb8bit"
    forward(layer)
    found = backend.dequantize(layer)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(found, bnb.functional.int8_vectorwise_dequant(codes, scales))
    assert found.dtype == backend.dtype(layer) == torch.float32
    assert error(found, weight) < 0.01
    assert backend.device(layer) == torch.device("cpu")
    assert backend.byte_count(layer) == shape[0] * shape[1] + 4 * shape[0]


@forwards
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_store_then_forward(forward, dtype, threshold):
    layer, weight = quantized(bias=True, threshold=threshold)
    forward(layer)
    identity = id(layer.weight)
    new = weight + 0.05 * torch.randn(weight.shape)
    backend.store(layer, new)
    assert id(layer.weight) == identity
    stored = backend.dequantize(layer)
    assert error(stored, new) < 0.01
    x = inputs(layer, dtype)
    expected = x.float() @ stored.t() + layer.bias.float()
    assert error(evaluate(layer, x), expected) < 0.02
    gradient = 2 * expected @ stored
    assert error(train_step(layer, x), gradient) < 0.03
    assert torch.equal(backend.dequantize(layer), stored)


@forwards
def test_store_of_dequantize_changes_nearly_nothing(forward):
    layer, _ = quantized()
    forward(layer)
    before = backend.dequantize(layer)
    backend.store(layer, before)
    assert error(backend.dequantize(layer), before) < 1e-3


@forwards
@pytest.mark.parametrize("forward_between", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_restore_is_bit_equal(forward, forward_between, shape):
    layer, _ = quantized(*shape, bias=True)
    x = inputs(layer)
    expected_output, expected_gradient = evaluate(copy.deepcopy(layer), x), train_step(copy.deepcopy(layer), x)
    forward(layer)
    weight = backend.dequantize(layer)
    where = (layer.weight.CB is None, layer.state.CB is None)
    snapshot = backend.snapshot(layer)
    for _ in range(2):
        backend.store(layer, weight * 1.5 + 0.1)
        if forward_between:
            assert not torch.equal(evaluate(layer, x), expected_output)
        backend.restore(layer, snapshot)
        assert (layer.weight.CB is None, layer.state.CB is None) == where
        assert torch.equal(backend.dequantize(layer), weight)
        assert torch.equal(evaluate(layer, x), expected_output)
        assert torch.equal(train_step(layer, x), expected_gradient)
        assert backend.byte_count(layer) == shape[0] * shape[1] + 4 * shape[0]


@forwards
def test_merge_equals_pefts(forward):
    import peft

    layer, _ = quantized(48, 32)
    model: Any = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    model.is_loaded_in_8bit = True
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    forward(layer)
    delta = adapted.base_model.model.layer.get_delta_weight("default").detach()
    with pytest.warns(UserWarning, match="8-bit"):
        adapted.base_model.model.layer.merge()
    theirs = adapted.base_model.model.layer.get_base_layer()
    backend.store(layer, backend.dequantize(layer) + delta)
    assert torch.equal(layer.weight.data, theirs.weight.data)
    x = inputs(layer)
    assert torch.equal(evaluate(layer, x), evaluate(theirs, x))


def test_floating_weights_quantized_on_the_fly():
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(16, 8, bias=False, has_fp16_weights=True)
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 16)
    weight = layer.weight.detach().clone()
    output = evaluate(layer, x)
    snapshot = backend.snapshot(layer)
    backend.store(layer, weight * 3)
    assert backend.dequantize(layer).data_ptr() == layer.weight.data_ptr()
    assert error(evaluate(layer, x), 3 * output) < 0.02
    backend.restore(layer, snapshot)
    assert torch.equal(layer.weight.detach(), weight)
    assert torch.equal(evaluate(layer, x), output)


def test_embedding():
    torch.manual_seed(0)
    dense = nn.Embedding(20, 8)
    layer = bnb.nn.Embedding8bit(20, 8)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu")
    weight = backend.dequantize(layer)
    tokens = torch.tensor([0, 3, 19])
    assert_close(layer(tokens), weight[tokens])
    snapshot = backend.snapshot(layer)
    backend.store(layer, weight * 2)
    assert_approximates(layer(tokens), 2 * weight[tokens], 1 / 254)
    backend.restore(layer, snapshot)
    assert torch.equal(backend.dequantize(layer), weight)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_grid_is_where_the_weight_lies_and_can_be_stored(out_features: int, in_features: int):
    layer, _ = quantized(out_features, in_features)
    grid = backend.grid(layer, backend.dequantize(layer))
    assert grid is not None
    units = backend.dequantize(layer) / grid.scales
    assert float((units - units.round()).abs().max()) < 1e-3
    places = torch.randint(0, 255, (out_features, in_features), dtype=torch.uint8)
    backend.restore(layer, grid.stored(places))
    assert_close(backend.dequantize(layer), grid.values(places))


def test_a_grid_reaches_as_far_as_the_weight_to_round():
    check_grid_of_larger_weight(backend, quantized()[0])


def test_a_prepared_layer_has_nothing_to_release() -> None:
    layer, _ = quantized()
    assert backend.prepare(layer) is False
