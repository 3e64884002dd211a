"""Backends of libraries that are installed here or not: the contract, and a gradient through the layer."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import resolve_backend
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import MergeError
from tests.closeness import assert_close


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed")


def dense(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64, dtype=dtype)


def torchao_int8(granularity: str = "row") -> nn.Module:
    quantization = library("torchao.quantization")
    granular: Any = library("torchao.quantization.granularity")
    model = nn.Sequential(dense())
    size = granular.PerRow() if granularity == "row" else granular.PerGroup(32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(granularity=size))
    return model[0]


def quanto(kind: str) -> nn.Module:
    quanto_library = library("optimum.quanto")
    model = nn.Sequential(dense())
    quanto_library.quantize(model, weights=getattr(quanto_library, kind))
    quanto_library.freeze(model)
    return model[0]


def hqq(bits: int, axis: int = 1) -> nn.Module:
    core: Any = library("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer: nn.Module = core.HQQLinear(dense(), config, compute_dtype=torch.float32, device="cpu")
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "torchao-int8-row": (lambda: torchao_int8("row"), "torchao", 0.01),
    "torchao-int8-group": (lambda: torchao_int8("group"), "torchao", 0.01),
    "quanto-int8": (lambda: quanto("qint8"), "quanto", 0.01),
    "quanto-int4": (lambda: quanto("qint4"), "quanto", 0.15),
    "quanto-int2": (lambda: quanto("qint2"), "quanto", 0.7),
    "quanto-float8": (lambda: quanto("qfloat8"), "quanto", 0.04),
    "hqq-8": (lambda: hqq(8), "hqq", 0.01),
    "hqq-4": (lambda: hqq(4), "hqq", 0.15),
    "hqq-4-axis-0": (lambda: hqq(4, 0), "hqq", 0.15),
}


COMPILED = ("quanto-int4", "quanto-int2")
"""For these quanto compiles an extension in a fresh environment, for minutes."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.long] * (name in COMPILED)) for name in LAYERS])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, float]:
    make, name, tolerance = LAYERS[request.param]
    layer = make()
    layer.requires_grad_(False)
    backend = resolve_backend(layer)
    assert backend is not None
    assert backend.name == name
    return layer, backend, tolerance


def error(found: Tensor, reference: Tensor) -> float:
    return float((found.detach().float() - reference.detach().float()).norm() / reference.detach().float().norm())


def test_dequantize(case):
    layer, backend, tolerance = case
    weight = backend.dequantize(layer)
    assert type(weight) is Tensor
    assert weight.shape == (64, 128)
    assert weight.dtype == backend.dtype(layer) == torch.float32
    assert not weight.requires_grad
    assert error(weight, dense().weight) < tolerance
    x = torch.randn(3, 128)
    assert error(layer(x), x @ weight.t() + layer.bias) < 0.02
    assert backend.device(layer) == torch.device("cpu")


def test_gradient_through_the_layer(case):
    layer, backend, _ = case
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert error(x.grad, backend.dequantize(layer).sum(0).expand(3, -1)) < 0.02


def test_store(case):
    layer, backend, tolerance = case
    new = backend.dequantize(layer) + 0.02 * torch.randn(64, 128)
    size = backend.byte_count(layer)
    backend.store(layer, new)
    assert error(backend.dequantize(layer), new) < tolerance
    assert backend.byte_count(layer) == size < 64 * 128 * 4
    x = torch.randn(3, 128)
    assert error(layer(x), x @ backend.dequantize(layer).t() + layer.bias) < 0.02
    assert resolve_backend(layer) is backend
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_restore_is_bit_equal(case):
    layer, backend, _ = case
    x = torch.randn(3, 128)
    weight, output = backend.dequantize(layer), layer(x)
    snapshot = backend.snapshot(layer)
    for _ in range(2):
        backend.store(layer, weight * 1.5 + 0.1)
        assert not torch.equal(layer(x), output)
        backend.restore(layer, snapshot)
        assert torch.equal(backend.dequantize(layer), weight)
        assert torch.equal(layer(x), output)


def test_an_adapter_trains_merges_and_comes_off(case):
    layer, _, tolerance = case
    model = nn.Sequential(layer)
    x = torch.randn(5, 128)
    before = model(x)
    manager = AdapterManager.attach(model)
    manager.add("one", LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in manager.parameters("one"))
    adapted = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager.merge()
    assert error(model(x), adapted) < max(2 * tolerance, 0.05)
    manager.unmerge()
    assert torch.equal(model(x), adapted)
    manager.remove("one")
    assert torch.equal(model(x), before)


def test_torchao_kinds_that_cannot_be_written_say_so():
    quantization = library("torchao.quantization")
    model = nn.Sequential(dense())
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    backend: Any = resolve_backend(model[0])
    assert error(backend.dequantize(model[0]), dense().weight) < 0.01
    with pytest.raises(MergeError, match="Int8Tensor"):
        backend.store(model[0], dense().weight)


class BlockwiseFp8(nn.Module):
    """The storage of transformers' FP8Linear, whose own forward needs a GPU kernel."""

    def __init__(self, block_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.in_features, self.out_features = 128, 60
        self.block_size = block_size
        self.weight = nn.Parameter(torch.zeros(60, 128).to(torch.float8_e4m3fn), requires_grad=False)
        shape = () if block_size is None else (-(-60 // block_size[0]), -(-128 // block_size[1]))
        self.weight_scale_inv = nn.Parameter(torch.ones(shape), requires_grad=False)


@pytest.mark.parametrize("block_size", [None, (32, 32), (16, 128)])
def test_fp8(block_size):
    layer = BlockwiseFp8(block_size)
    backend: Any = resolve_backend(layer)
    assert backend.name == "fp8"
    torch.manual_seed(0)
    weight = torch.randn(60, 128) * torch.logspace(-3, 2, 60)[:, None]
    backend.store(layer, weight)
    found = backend.dequantize(layer)
    assert found.dtype == torch.bfloat16
    assert error(found, weight) < 0.05
    assert error(found[:16], weight[:16]) < (1.1 if block_size is None else 0.05)
    assert backend.byte_count(layer) == 60 * 128 + 4 * layer.weight_scale_inv.numel()
    snapshot = backend.snapshot(layer)
    backend.store(layer, weight * 3)
    backend.restore(layer, snapshot)
    assert torch.equal(backend.dequantize(layer), found)
    before = copy.deepcopy(found)
    backend.store(layer, found)
    assert error(backend.dequantize(layer), before) < 0.02


def test_aqlm_is_read_before_and_after_a_forward():
    inference: Any = library("aqlm.inference")
    utils: Any = library("aqlm.utils")
    torch.manual_seed(0)
    layer: Any = inference.QuantizedLinear(64, 32, 8, 1, 2, 8, bias=True, dtype=torch.float32)
    layer.codebooks.data.normal_()
    layer.scales.data.uniform_(0.5, 1)
    layer.codes.data.random_(-128, 127)
    layer.bias.data.normal_()
    layer.requires_grad_(False)
    expected = utils._dequantize_weight(utils.unpack_int_data(layer.codes, 8), layer.codebooks, layer.scales)
    backend: Any = resolve_backend(layer)
    assert backend.name == "aqlm"
    assert error(backend.dequantize(layer), expected) < 1e-6
    library("numba")
    layer(torch.randn(1, 64))
    assert layer.codes.shape[:2] == (8, 32)
    assert error(backend.dequantize(layer), expected) < 1e-6
    with pytest.raises(MergeError, match="codebooks"):
        backend.store(layer, expected)


def test_awq_is_known_and_cannot_be_merged_into():
    gemm: Any = library("awq.modules.linear.gemm")
    layer = gemm.WQLinear_GEMM(4, 64, 128, 64, True, "cpu")
    backend: Any = resolve_backend(layer)
    assert backend.name == "awq"
    assert backend.dtype(layer) == torch.float16
    assert backend.byte_count(layer) == 128 * 64 // 2 + 2 * 64 // 2 + 2 * 64 * 2
    manager = AdapterManager.attach(nn.Sequential(layer))
    manager.add("one", LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(MergeError, match="calibration"):
        manager.merge()
    assert manager.merged == ()


class Packed(nn.Linear):
    """A layer as compressed-tensors leaves it: a scheme, packed codes, and a forward of its own."""

    def __init__(self) -> None:
        super().__init__(16, 8)
        self.quantization_scheme = object()
        self.weight_packed = nn.Parameter(torch.randint(-8, 8, (8, 16), dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(8, 1), requires_grad=False)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_packed * self.weight_scale, self.bias)


def test_a_compressed_layer_is_read_through_its_own_forward():
    layer = Packed()
    backend: Any = resolve_backend(layer)
    assert backend.name == "compressed-tensors"
    assert_close(backend.dequantize(layer), layer.weight_packed * layer.weight_scale)
    assert backend.byte_count(layer) == 8 * 16 + 8 * 4
    with pytest.raises(MergeError, match="decompressed"):
        backend.store(layer, torch.zeros(8, 16))


def test_what_is_kept_beside_the_codes_is_counted() -> None:
    layer: Any = hqq(4)
    backend = resolve_backend(layer)
    assert backend is not None
    counted = {tensor.data_ptr() for tensor in backend.tensors(layer)}
    assert {tensor.data_ptr() for tensor in (layer.W_q, layer.meta["scale"], layer.meta["zero"])} <= counted
