"""Embedding and the convolutions: forward, gradients, deltas and shapes as in PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import resolve_layer_kind
from nbpeft.engine.injection.plan import plan
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.dropout import Dropout
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import ConfigError, MergeError
from tests.closeness import assert_close, assert_same, differ


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the output is scaled by a buffer."""

    embed_scale: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Holder(nn.Module):
    """One layer under a name that configs can target."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "embedding": (lambda: nn.Embedding(11, 6), None),
    "padded": (lambda: nn.Embedding(11, 6, padding_idx=2), None),
    "by-frequency": (lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), None),
    "scaled": (lambda: ScaledEmbedding(11, 6), None),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d-nobias": (lambda: nn.Conv1d(4, 6, 1, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 4, 7, 8)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), (2, 4, 4, 5, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "grouped-1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2), (2, 4, 9)),
    "grouped-depthwise": (lambda: nn.Conv3d(4, 8, 2, groups=4), (2, 4, 3, 4, 3)),
}
UNGROUPED = [name for name in LAYERS if not name.startswith("grouped")]
WITH_METHODS = [(name, dora) for dora in (False, True) for name in LAYERS]
CONVOLUTIONS = [name for name, (_, shape) in LAYERS.items() if shape is not None]


def pair(kind: str, **options: Any) -> tuple[Holder, Any, AdapterManager, Tensor]:
    """The same layer with the same random adapter, in PEFT and here, and an input."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    theirs, ours = Holder(make()), Holder(make())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randint(0, 11, (3, 5)) if shape is None else torch.randn(shape)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(theirs, peft.LoraConfig(init_lora_weights=False, **settings))
    manager = AdapterManager.attach(ours)
    manager.add("default", LoraConfig(**settings))
    own = manager.weights("default").adapters["layer"]
    with torch.no_grad():
        for name, tensor in oracle_tensors(oracle).items():
            if name == "lora_magnitude_vector":
                tensor.mul_(torch.rand_like(tensor) + 0.5)
            assert own[name].shape == tensor.shape, name
            own[name].copy_(tensor)
    return ours, oracle, manager, x


def oracle_tensors(oracle: Any) -> dict[str, Tensor]:
    layer = oracle.base_model.model.layer
    found: dict[str, Tensor] = {}
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        holder = getattr(layer, name)
        if "default" in holder:
            found[name] = holder["default"] if "embedding" in name else holder["default"].weight
    if "lora_B" in found and layer.lora_B["default"].bias is not None:
        found["lora_B_bias"] = layer.lora_B["default"].bias
    if getattr(layer, "lora_magnitude_vector", None):
        found["lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
    return found


@pytest.mark.parametrize(("kind", "dora"), WITH_METHODS)
def test_output_and_gradients_equal_peft(kind: str, dora: bool) -> None:
    ours, oracle, manager, x = pair(kind, use_dora=dora)
    x_ours, x_theirs = x.clone(), x.clone()
    if x.is_floating_point():
        x_ours.requires_grad_()
        x_theirs.requires_grad_()
    found, expected = ours(x_ours), oracle(x_theirs)
    assert_close(found, expected)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    own = manager.weights("default").adapters["layer"]
    for name, tensor in oracle_tensors(oracle).items():
        assert_close(own[name].grad, tensor.grad, message=name)
    if x.is_floating_point():
        assert_close(x_ours.grad, x_theirs.grad)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", UNGROUPED)
def test_merged_weight_equals_peft_and_forward(kind: str, dora: bool) -> None:
    ours, oracle, manager, x = pair(kind, use_dora=dora)
    before = ours(x)
    frozen = ours.layer.weight.detach().clone()
    manager.merge()
    oracle.merge_adapter()
    assert_close(ours.layer.weight, oracle.base_model.model.layer.weight)
    assert_close(ours(x), before)
    manager.unmerge()
    assert torch.equal(ours.layer.weight, frozen)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_lora_bias_equals_peft(kind: str) -> None:
    ours, oracle, _, x = pair(kind, lora_bias=True)
    assert_close(ours(x), oracle(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_starts_as_the_base(kind: str) -> None:
    make, shape = LAYERS[kind]
    x = torch.randint(0, 11, (3, 5)) if shape is None else torch.randn(shape)
    for dora in (False, True):
        model = Holder(make())
        before = model(x)
        AdapterManager.attach(model).add("default", LoraConfig(r=4, target_modules=["layer"], use_dora=dora))
        assert_close(model(x), before)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("dora", [False, True])
def test_padding_modes_are_those_of_the_merged_layer(mode: Any, dora: bool) -> None:
    """PEFT pads the adapter's input with zeros here, so its forward and its merged layer differ."""
    torch.manual_seed(0)
    model = Holder(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
    manager = AdapterManager.attach(model)
    manager.add("default", LoraConfig(r=4, target_modules=["layer"], use_dora=dora, init_lora_weights=False))
    x = torch.randn(2, 4, 6, 6)
    before = model(x)
    manager.merge()
    assert_close(model(x), before)


@pytest.mark.parametrize("dora", [False, True])
def test_dilation(dora: bool) -> None:
    """PEFT's adapter has no dilation: its output does not fit the layer's."""
    torch.manual_seed(0)
    model = Holder(nn.Conv1d(4, 6, 3, dilation=2))
    manager = AdapterManager.attach(model)
    manager.add("default", LoraConfig(r=4, target_modules=["layer"], use_dora=dora, init_lora_weights=False))
    x = torch.randn(2, 4, 12)
    before = model(x)
    manager.merge()
    assert_close(model(x), before)


def test_max_norm_leaves_the_adapter_alone() -> None:
    torch.manual_seed(0)
    model = Holder(nn.Embedding(11, 6, max_norm=0.5))
    manager = AdapterManager.attach(model)
    manager.add("default", LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    own = manager.weights("default").adapters["layer"]
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    ids = torch.arange(11)
    base = model.layer.base_layer(ids)
    product = (before["lora_embedding_B"] @ before["lora_embedding_A"]).T
    assert_close(model(ids), base + product * 2)
    assert all(torch.equal(own[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("kind", "dora"), [case for case in WITH_METHODS if case[0] in CONVOLUTIONS])
def test_dropout_in_training_draws_a_mask_once(kind: str, dora: bool) -> None:
    """The gradient is that of the very mask the forward drew: a numerical derivative agrees."""
    ours, _, manager, x = pair(kind, lora_dropout=0.4, use_dora=dora)
    ours.double()
    ours.train()
    x = x.double()
    lora_B = manager.weights("default").adapters["layer"]["lora_B"]
    direction = torch.randn_like(lora_B)

    def value(step: float) -> Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            lora_B.add_(direction, alpha=step)
        result = ours(x).square().sum()
        with torch.no_grad():
            lora_B.add_(direction, alpha=-step)
        return result

    torch.manual_seed(7)
    output = ours(x)
    output.square().sum().backward()
    assert lora_B.grad is not None
    if not dora:  # DoRA's norm counts as a constant for the gradient
        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        assert_close((lora_B.grad * direction).sum(), slope, scale=float(output.detach().square().sum()) / 1e-5)
    torch.manual_seed(8)
    assert differ(ours(x), output)
    ours.eval()
    assert_same(ours(x), ours(x))


def test_gradcheck_of_the_convolution_that_keeps_only_its_input() -> None:
    torch.manual_seed(0)
    module = nn.Conv1d(2, 4, 3, padding=1).double()
    host: Any = resolve_layer_kind(module)
    x = torch.randn(2, 2, 5, dtype=torch.double, requires_grad=True)
    lora_A = torch.randn(2, 2, 3, dtype=torch.double, requires_grad=True)
    lora_B = torch.randn(4, 2, 1, dtype=torch.double, requires_grad=True)

    def work(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return low_rank_of(host).forward(module, x, (lora_A, lora_B, 1.5), Dropout(0.3, True))

    assert torch.autograd.gradcheck(work, (x, lora_A, lora_B))


def test_a_half_convolution_keeps_only_its_input_for_backward() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(16, 16, 3, padding=1).to(torch.bfloat16)
    host: Any = resolve_layer_kind(module)
    x = torch.randn(2, 16, 32, 32, dtype=torch.bfloat16, requires_grad=True)
    lora_A, lora_B = torch.randn(4, 16, 3, 3, requires_grad=True), torch.randn(16, 4, 1, 1, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = low_rank_of(host).forward(module, x, (lora_A, lora_B, 1.5), Dropout(0.1, True))
    assert output.dtype == torch.float32
    assert sum(saved.values()) == sum(tensor.untyped_storage().nbytes() for tensor in (x, lora_A, lora_B))


@pytest.mark.parametrize("kind", LAYERS)
def test_half_base(kind: str) -> None:
    ours, oracle, _, x = pair(kind)
    expected = ours(x)
    for layer in (ours.layer.base_layer, oracle.base_model.model.layer.base_layer):
        layer.to(torch.bfloat16)
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    found = ours(x)
    assert found.dtype == torch.bfloat16
    assert_close(found, oracle(x), depth=2)
    assert_close(found.float(), expected, dtype=torch.bfloat16, depth=2)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_whole(kind: str) -> None:
    torch._dynamo.reset()
    ours, _, _, x = pair(kind)
    expected = ours(x)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_close(compiled(x), expected)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", [name for name in LAYERS if name.startswith("grouped")])
def test_no_grouped_convolution_is_merged_as_in_peft(kind: str, use_dora: bool) -> None:
    """Its adapter sees all input channels: what it adds is no weight of the layer, and the layer stays as it is."""
    ours, theirs, manager, x = pair(kind, use_dora=use_dora)
    with pytest.raises(NotImplementedError, match="Merging is not supported for _ConvNd layers with groups > 1"):
        theirs.merge_adapter()
    before, expected = {name: value.clone() for name, value in ours.state_dict().items()}, ours(x)
    for merge in (manager.merge, lambda: manager.unload(merge=True)):
        with pytest.raises(MergeError, match=r"cannot be merged into a Conv[123]d with [24] groups: the adapter sees"):
            merge()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    assert torch.equal(ours(x), expected)


def test_grouped_convolutions_are_refused_where_they_cannot_work() -> None:
    grouped = Holder(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(ConfigError, match="2 groups cannot take rank 3: choose a multiple of 2"):
        plan(grouped, LoraConfig(r=3, target_modules=["layer"]))
    manager = AdapterManager.attach(grouped)
    manager.add("default", LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    before = grouped.layer.weight.detach().clone()
    with pytest.raises(MergeError, match="cannot be merged into a Conv2d with 2 groups"):
        manager.merge()
    with pytest.raises(MergeError, match="cannot be merged into a Conv2d with 2 groups"):
        manager.unload(merge=True)
    assert torch.equal(grouped.layer.weight, before)


def test_lookups_refuse_what_peft_refuses() -> None:
    with pytest.raises(ConfigError, match="lora_bias=True is not supported for Embedding"):
        plan(Holder(nn.Embedding(11, 6)), LoraConfig(r=4, target_modules=["layer"], lora_bias=True))
    strange: Any = nn.Embedding(11, 6)
    strange.embed_scale = nn.Parameter(torch.ones(6))
    with pytest.raises(ConfigError, match=r"embed_scale has shape \(6,\)"):
        plan(Holder(strange), LoraConfig(r=4, target_modules=["layer"]))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_lookups_and_convolutions_mix_in_a_batch(dora: bool) -> None:
    for kind in UNGROUPED:
        ours, _, manager, x = pair(kind)
        manager.add("other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, use_dora=dora))
        alone = {}
        for name in ("default", "other"):
            manager.activate(name)
            alone[name] = ours(x)
        manager.activate(["other", "default"])
        with manager.disabled():
            base = ours(x)
        assert_close(ours(x), alone["default"] + alone["other"] - base)
