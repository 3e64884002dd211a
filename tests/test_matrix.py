"""What every method promises on every kind of layer and every way its weight is stored."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.adapter import AdapterConfig
from nbpeft.engine.lora_config import LoraConfig
from nbpeft.engine.model_tree import manager_of
from nbpeft.errors import TargetError
from nbpeft.model import PeftModel, get_peft_model

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")


class Net(nn.Module):
    """One layer of the kind under test between two that stay plain."""

    def __init__(self, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.target = layer
        self.norm = nn.LayerNorm(8)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.target(x)
        return self.after(hidden.float()) if hidden.is_floating_point() else hidden


@dataclass
class Case:
    """A layer and what to expect of it."""

    layer: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    peft_config: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    tolerance: float = 1e-5
    merge_tolerance: float = 1e-5


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def _conv1d() -> nn.Module:
    layer = Conv1D(24, 16)
    nn.init.normal_(layer.bias)
    return layer


def _linear4bit(**options: Any) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, **options)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu")


def _linear8bit() -> nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=True, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu")


CASES = {
    "linear": Case(lambda: nn.Linear(16, 24), _floats(3, 5, 16)),
    "linear-no-bias": Case(lambda: nn.Linear(16, 24, bias=False), _floats(3, 5, 16)),
    "linear-bf16": Case(
        lambda: nn.Linear(16, 24).to(torch.bfloat16),
        _floats(3, 5, 16, dtype=torch.bfloat16),
        tolerance=1e-2,
        merge_tolerance=5e-2,
    ),
    "transformers-conv1d": Case(_conv1d, _floats(3, 5, 16), {"fan_in_fan_out": True}),
    "embedding": Case(lambda: nn.Embedding(11, 24), lambda: torch.tensor([[1, 4, 9], [0, 10, 2]])),
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3, padding=1), _floats(2, 6, 9)),
    "conv2d": Case(lambda: nn.Conv2d(3, 8, 3, stride=2), _floats(2, 3, 9, 9)),
    "conv3d": Case(lambda: nn.Conv3d(3, 8, 2), _floats(2, 3, 4, 5, 6)),
    "nf4": Case(
        lambda: _linear4bit(quant_type="nf4"), _floats(2, 3, 64), quantized=True, tolerance=1e-4, merge_tolerance=0.5
    ),
    "fp4-double": Case(
        lambda: _linear4bit(quant_type="fp4", compress_statistics=True),
        _floats(2, 3, 64),
        quantized=True,
        tolerance=1e-4,
        merge_tolerance=0.5,
    ),
    "int8": Case(_linear8bit, _floats(2, 3, 64), quantized=True, tolerance=1e-4, merge_tolerance=0.15),
}

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}

pytestmark = pytest.mark.filterwarnings("ignore:merging into", "ignore:MatMul8bitLt", "ignore::FutureWarning")


def settings(method: str, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["target"], **METHODS[method], **more}


def make(case: Case) -> Net:
    torch.manual_seed(0)
    return Net(case.layer(), nn.Tanh()).eval()


def randomise(model: nn.Module) -> None:
    """Moves every adapter parameter off its start, so that nothing is zero."""
    generator = torch.Generator().manual_seed(9)
    manager = manager_of(model)
    assert manager is not None
    with torch.no_grad():
        for name in manager.names:
            for parameter in manager.parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


def adapted(case: Case, method: str, **more: Any) -> tuple[Net, PeftModel]:
    base = make(case)
    model = get_peft_model(base, LoraConfig(**settings(method, **more)))
    randomise(base)
    return base, model.eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def stored_in(model: Any) -> list[Tensor]:
    """Copies of all tensors that the weight under test is stored in; a forward may pack them anew."""
    layer = model.target
    return [tensor.detach().clone() for tensor in layer.backend.tensors(layer.base_layer)]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


everywhere = pytest.mark.parametrize("kind", CASES)
every_method = pytest.mark.parametrize("method", METHODS)


@everywhere
@every_method
def test_identity_at_start(kind: str, method: str) -> None:
    case = CASES[kind]
    base = make(case)
    x = case.batch()
    before = base(x)
    model = get_peft_model(base, LoraConfig(**settings(method))).eval()
    assert torch.allclose(model(x), before, atol=case.tolerance / 10, rtol=0)


@everywhere
@every_method
def test_failed_injection_leaves_the_model_as_it_was(kind: str, method: str) -> None:
    case = CASES[kind]
    base = make(case)
    before, modules = weights_of(base), [type(m) for m in base.modules()]
    trainable = [name for name, p in base.named_parameters() if p.requires_grad]
    with pytest.raises(TargetError, match="LayerNorm"):
        get_peft_model(base, LoraConfig(**settings(method, target_modules=["target", "norm"])))
    assert same(before, weights_of(base))
    assert modules == [type(m) for m in base.modules()]
    assert trainable == [name for name, p in base.named_parameters() if p.requires_grad]
    assert manager_of(base) is None


@everywhere
@every_method
def test_gradients_reach_every_adapter_parameter_and_no_other(kind: str, method: str) -> None:
    case = CASES[kind]
    _, model = adapted(case, method)
    model.train()
    model(case.batch()).square().sum().backward()
    adapter_parameters = {id(p) for p in model.manager.parameters("default")}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapter_parameters:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@everywhere
@every_method
def test_merged_gives_what_forward_gave(kind: str, method: str) -> None:
    case = CASES[kind]
    _, model = adapted(case, method)
    x = case.batch()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=case.merge_tolerance, rtol=0)
    base = model.merge_and_unload()
    assert not any("adapters" in name for name, _ in base.named_modules())
    assert torch.allclose(base(x), expected, atol=case.merge_tolerance, rtol=0)


@everywhere
@every_method
def test_unmerge_is_bit_equal(kind: str, method: str) -> None:
    case = CASES[kind]
    base, model = adapted(case, method)
    x = case.batch()
    expected, before, stored = model(x), weights_of(base), stored_in(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    model(x)
    model.unmerge_adapter()
    assert all(torch.equal(*pair) for pair in zip(stored, stored_in(base), strict=True))
    assert torch.equal(model(x), expected)
    if not case.quantized:
        assert same(before, weights_of(base))


@everywhere
@every_method
def test_save_remove_load_is_equal(kind: str, method: str, tmp_path: Any) -> None:
    case = CASES[kind]
    base, model = adapted(case, method)
    x = case.batch()
    expected = model(x)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    assert manager_of(plain) is None and plain is base
    again = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.allclose(again(x), expected, atol=1e-6, rtol=0)


@everywhere
def test_two_active_adapters_in_either_order_are_equal(kind: str) -> None:
    case = CASES[kind]
    base, model = adapted(case, "dora")
    model.add_adapter("other", LoraConfig(**settings("lora", r=2, init_lora_weights=False)))
    randomise(base)
    model.eval()
    x = case.batch()
    model.set_adapter(["default", "other"])
    first = model(x)
    model.set_adapter(["other", "default"])
    assert torch.allclose(first, model(x), atol=case.tolerance / 10, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert torch.allclose(first, model(x), atol=case.merge_tolerance, rtol=0)


@everywhere
@every_method
def test_equal_to_peft_for_the_same_weights(kind: str, method: str, tmp_path: Any) -> None:
    case = CASES[kind]
    _, model = adapted(case, method, **case.peft_config)
    x = case.batch()
    # In eval mode bitsandbytes takes another kernel, and peft reads the re-packed weight wrongly for DoRA.
    model.train(case.quantized)
    expected = model(x)
    model.save_pretrained(tmp_path)
    oracle = peft.PeftModel.from_pretrained(make(case), tmp_path).train(case.quantized)
    assert torch.allclose(oracle(x), expected, atol=case.tolerance, rtol=0)


@everywhere
@every_method
def test_deepcopy_and_pickle_survive(kind: str, method: str) -> None:
    case = CASES[kind]
    _, model = adapted(case, method)
    x = case.batch()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with twin.disable_adapter():
        assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    if case.quantized:
        return
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(x), expected)


def test_every_registered_method_is_in_the_matrix() -> None:
    from nbpeft.engine.registry import method_of, methods

    labels = {method_of(LoraConfig(**settings(name))).label for name in METHODS}
    assert {method.label for method in methods() if issubclass(method.config_class, AdapterConfig)} <= labels
