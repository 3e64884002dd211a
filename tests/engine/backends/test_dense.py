from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.backends.dense import Dense
from nbpeft.engine.contract.registry import resolve_backend
from tests.engine.backends.support import backend_name

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "linear_no_bias": lambda: nn.Linear(8, 3, bias=False),
    "conv1d_of_gpt2": lambda: Conv1D(6, 4),
    "embedding": lambda: nn.Embedding(11, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d_grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
backend = Dense()


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_stored_tensor(layer, dtype):
    layer = layer.to(dtype)
    assert backend.matches(layer)
    assert backend_name(layer) == "dense"
    weight = backend.dequantize(layer)
    assert weight.data_ptr() == layer.weight.data_ptr()
    assert not weight.requires_grad
    assert weight.dtype == backend.dtype(layer) == dtype
    assert backend.device(layer) == torch.device("cpu")
    assert backend.byte_count(layer) == layer.weight.numel() * dtype.itemsize
    weight.add_(1.0)
    assert torch.equal(weight, layer.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_copies_and_converts(layer, dtype):
    layer = layer.to(dtype)
    pointer = layer.weight.data_ptr()
    new = torch.randn(layer.weight.shape)
    backend.store(layer, new)
    assert layer.weight.data_ptr() == pointer
    assert torch.equal(layer.weight.detach(), new.to(dtype))
    new.zero_()
    assert layer.weight.detach().abs().sum() > 0


def test_store_of_the_own_tensor_keeps_it(layer):
    weight = backend.dequantize(layer)
    weight.mul_(2)
    expected = weight.clone()
    backend.store(layer, weight)
    assert torch.equal(layer.weight.detach(), expected)


def test_store_of_a_transposed_view_of_the_own_tensor():
    layer = nn.Linear(4, 4, bias=False)
    expected = layer.weight.detach().t().clone()
    backend.store(layer, layer.weight.detach().t().clone())
    assert torch.equal(layer.weight.detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bit_equal_and_the_snapshot_independent(layer, dtype):
    layer = layer.to(dtype)
    before = layer.weight.detach().clone()
    snapshot = backend.snapshot(layer)
    for _ in range(2):
        backend.dequantize(layer).add_(3.0)
        assert not torch.equal(layer.weight.detach(), before)
        backend.restore(layer, snapshot)
        assert torch.equal(layer.weight.detach(), before)
    assert layer.weight.requires_grad


def test_what_is_not_dense():
    assert not backend.matches(nn.ReLU())
    integer = nn.Linear(2, 2)
    integer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert not backend.matches(integer)
    float8 = nn.Linear(2, 2)
    float8.weight = nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    assert not backend.matches(float8)
    assert resolve_backend(integer) is None


def test_meta_weight():
    layer = nn.Linear(4, 2, device="meta")
    assert backend.matches(layer)
    assert backend.device(layer).type == "meta"
    assert backend.byte_count(layer) == 0
