"""Adapters that act on rounded weights: against merging, against gradients by hand, and what they keep."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nbpeft.engine.wrappers.fake_quant import FakeQuantLayer
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model import LoraConfig, get_peft_model, inject_adapter_in_model
from nbpeft.model.quantization.quantize import quantize_model
from tests.closeness import assert_close
from tests.tiny_models import llama as tiny_llama
from tests.tiny_models import randomize, tokens

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:merging into", "ignore:MatMul8bitLt", "ignore:.*cast from")

SETTINGS = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}


def llama(**changes: Any) -> Any:
    return tiny_llama(hidden_size=64, intermediate_size=128, **changes)


def rounded(base: Any, scale: float = 0.1, **changes: Any) -> Any:
    model = get_peft_model(base, LoraConfig(**SETTINGS | changes, quantization_aware=True))
    randomize(model, scale=scale)
    return model


def quanto(kind: str) -> Any:
    library = pytest.importorskip("optimum.quanto")
    model = llama()
    library.quantize(model, weights=getattr(library, kind), exclude="lm_head")
    library.freeze(model)
    return model


def hqq() -> Any:
    library = pytest.importorskip("hqq.core.quantize")
    model = llama()
    settings = library.BaseQuantizeConfig(nbits=4, group_size=64)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            made = library.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
            model.set_submodule(path, made)
    return model


BASES = {
    "nf4 double": lambda: quantize_model(llama()),
    "fp4": lambda: quantize_model(llama(), quant_type="fp4", double_quant=False),
    "bfloat16": lambda: quantize_model(llama(dtype=torch.bfloat16)),
    "int8": lambda: quantize_model(llama(), bits=8),
    "quanto int4": lambda: quanto("qint4"),
    "quanto int8": lambda: quanto("qint8"),
    "hqq": hqq,
}


# Quanto's first four bits compile a kernel.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "quanto int4")) for kind in BASES]
)
def test_merging_changes_no_bit(kind: str) -> None:
    model, ids = rounded(BASES[kind]()).train(), tokens()
    for seed in (7, 8):
        with torch.no_grad():
            before = model(ids).logits
            plain = [layer.base.weight().clone() for layer in model.manager.layers.values()]
            model.merge_adapter()
            assert torch.equal(model(ids).logits, before)
            model.unmerge_adapter()
            assert all(map(torch.equal, plain, [layer.base.weight() for layer in model.manager.layers.values()]))
        with torch.no_grad(), model.disable_adapter():
            assert not torch.equal(model(ids).logits, before)
        randomize(model, scale=0.2, seed=seed)
        assert not torch.equal(model(ids).logits, before), "what it is made of has changed"


class Reference(torch.autograd.Function):
    """W + delta, rounded by the merge, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, merged: Tensor) -> Tensor:
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@pytest.mark.parametrize(("kind", "more"), [("nf4 double", {}), ("fp4", {"use_rslora": True})])
def test_gradients_are_those_of_the_straight_through_estimator(kind: str, more: dict[str, Any]) -> None:
    model = rounded(BASES[kind](), **more).train()
    layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    adapter, x = layer.adapter("default"), torch.randn(2, 5, 64, requires_grad=True)
    weight = torch.randn(2, 5, 128)
    (layer(x) * weight).sum().backward()
    given = [x.grad, adapter.lora_A.grad, adapter.lora_B.grad]
    twin = copy.deepcopy(model)
    twin.merge_adapter()
    merged = twin.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base.weight()
    for tensor in (x, adapter.lora_A, adapter.lora_B):
        tensor.grad = None
    product = adapter.lora_B @ adapter.lora_A * adapter.scaling
    (F.linear(x, Reference.apply(product, merged)) * weight).sum().backward()
    for mine, tensor in zip(given, (x, adapter.lora_A, adapter.lora_B), strict=True):
        assert_close(mine, tensor.grad)


def test_biases_of_adapters_and_several_adapters() -> None:
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantize_model(base)
    config = LoraConfig(r=4, target_modules=["0", "2"], lora_bias=True, quantization_aware=True)
    model = get_peft_model(base, config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["2"]))
    for name in ("default", "other"):
        randomize(model, name, scale=0.2)
    x = torch.randn(3, 64)
    with torch.no_grad():
        for names in (["default"], ["default", "other"]):
            model.base_model.set_adapter(names)
            before = model(x)
            model.merge_adapter(names)
            assert torch.equal(model(x), before)
            model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    model(x).sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for name in ("default", "other") for p in model.manager.parameters(name)
    )


class Counted:
    """How often weights were merged and rounded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.count = 0
        kind = type(next(iter(model.manager.layers.values())))
        plain = kind.write_merged

        def write(*args: Any) -> None:
            self.count += 1
            plain(*args)

        monkeypatch.setattr(kind, "write_merged", write)

    def since(self) -> int:
        found, self.count = self.count, 0
        return found


@pytest.fixture
def model() -> Any:
    return rounded(quantize_model(llama())).train()


def test_a_weight_is_rounded_once_a_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, layers, ids = Counted(monkeypatch, model), len(model.manager.layers), tokens()
    optimizer = torch.optim.SGD(model.manager.parameters("default"), lr=0.1)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        for _ in range(3):  # gradients are summed
            model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model(ids)
        assert counted.since() == layers
        optimizer.step()
        optimizer.zero_grad()
    for parameter in model.manager.parameters("default"):
        parameter.data.mul_(1.5)  # torch counts no such change
    model(ids, labels=ids).loss.backward()
    for parameter in model.manager.parameters("default"):
        parameter.data.mul_(1.5)
    model(ids)
    assert counted.since() == 2 * layers
    model.set_adapter_scale("default", 0.5) if hasattr(model, "set_adapter_scale") else model.manager.set_scale(
        "default", 0.5
    )
    model(ids)
    assert counted.since() == layers


def test_recomputed_in_backward_it_gives_the_same_gradients(model: Any) -> None:
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    found = []
    for wrap in (lambda run, x: run(x), lambda run, x: checkpoint(run, x, use_reentrant=False)):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model.zero_grad()
        wrap(layer, x).square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in layer.adapter("default").parameters())])
    assert all(map(torch.equal, *found))


def saved_bytes(model: Any) -> int:
    ids, seen = tokens(2, 32), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    del loss
    return sum(seen.values())


def test_backward_keeps_what_it_keeps_of_an_adapter_beside_the_layer(model: Any) -> None:
    plain = get_peft_model(quantize_model(llama()), LoraConfig(**SETTINGS)).train()
    assert saved_bytes(model) <= saved_bytes(plain)


def test_no_copy_and_no_file_has_the_twins(model: Any) -> None:
    keys = set(model.state_dict())
    model(tokens())
    layers = list(model.manager.layers.values())
    assert all(isinstance(layer._twin, FakeQuantLayer) for layer in layers) and set(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert all(layer._twin._module is None for layer in twin.manager.layers.values())
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    model.merge_adapter()
    assert all(layer._twin is None for layer in layers)


def refusals() -> Iterator[tuple[Any, str]]:
    aware = {**SETTINGS, "quantization_aware": True}
    yield lambda: LoraConfig(**aware, use_dora=True), "does not work with use_dora=True"
    yield lambda: LoraConfig(**aware, lora_dropout=0.1), "does not work with lora_dropout=0.1"
    yield lambda: get_peft_model(llama(), LoraConfig(**aware)), "none of the target layers is quantized: remove it"


@pytest.mark.parametrize("number", range(3))
def test_what_cannot_be_is_one_line(number: int) -> None:
    call, words = list(refusals())[number]
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_refused_adapter_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantize_model(llama())
    from nbpeft.engine.backends.bnb4bit import Bnb4bit

    monkeypatch.setattr(Bnb4bit, "can_merge", False)
    monkeypatch.setattr(Bnb4bit, "unmergeable_reason", "it is read-only here")
    with pytest.raises(
        ConfigError, match=r"q_proj: quantization_aware=True needs .* cannot be merged into: it is read"
    ):
        inject_adapter_in_model(LoraConfig(**SETTINGS, quantization_aware=True), base)
    assert not hasattr(base, "peft_config") and type(base.model.layers[0].self_attn.q_proj) is bnb.nn.Linear4bit


def test_rows_of_several_adapters_and_traced_calls_are_refused(model: Any) -> None:
    model.add_adapter("other", LoraConfig(**SETTINGS))
    ids = tokens()
    with pytest.raises(AdapterError, match="do not support mixed batches"):
        model.eval()(ids, adapter_names=["default", "other"])
    with pytest.raises(AdapterError, match="cannot be compiled or traced"):
        torch.func.functional_call(model, {}, (ids,)) if False else torch.func.vmap(lambda x: model(x).logits)(
            ids[:, None]
        )


def test_a_base_that_was_changed_is_merged_into_anew() -> None:
    model, ids = rounded(quantize_model(llama(num_hidden_layers=1))), tokens()
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.manager.layers.values():
            layer.backend.store(layer.base_layer, 0.5 * layer.base.weight())
        after = model(ids).logits
        assert not torch.equal(after, before)
        model.merge_adapter()
        assert torch.equal(model(ids).logits, after)
