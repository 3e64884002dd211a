"""Modules put in the place of parts of an adapter, as ``layer.lora_A["default"] = nn.Linear(...)``: they act."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import Tensor, nn

import nbpeft.model as nbpeft
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import methods
from nbpeft.engine.views.part_modules import ParameterMapping, ShownParts
from nbpeft.errors import AdapterError, MergeError
from tests.closeness import assert_close, differ
from tests.engine.views.test_part_modules import IDS, pair

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be merged")


def linear(rows: int, columns: int, **more: Any) -> nn.Linear:
    made = nn.Linear(columns, rows, **{"bias": False, **more})
    nn.init.normal_(made.weight)
    return made


def both(name: str = "linear") -> tuple[Any, Any]:
    """A model here and in peft with the same numbers."""
    ours, theirs = pair(name, ("default", "other"))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def equal(ours: Any, theirs: Any, before: Tensor | None = None) -> None:
    with torch.no_grad():
        assert_close(ours(IDS), theirs(IDS))
        if before is not None:
            assert differ(ours(IDS), before)


WAYS: dict[str, Callable[[Any, str, nn.Module], Any]] = {
    "item": lambda layer, name, module: getattr(layer, name).__setitem__("default", module),
    "update": lambda layer, name, module: getattr(layer, name).update({"default": module}),
    "attribute": lambda layer, name, module: setattr(getattr(layer, name), "default", module),
    "add_module": lambda layer, name, module: getattr(layer, name).add_module("default", module),
    "_modules": lambda layer, name, module: getattr(layer, name)._modules.__setitem__("default", module),
    "whole": lambda layer, name, module: setattr(
        layer, name, nn.ModuleDict({"default": module, "other": getattr(layer, name)["other"]})
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("part", "shape"), [("lora_A", (4, 6)), ("lora_B", (8, 4))])
def test_a_plain_linear_acts_whichever_way_it_is_put_there(way: str, part: str, shape: tuple[int, int]) -> None:
    ours, theirs = both()
    before, made = ours(IDS), linear(*shape)
    for model in (ours, theirs):
        module = copy.deepcopy(made)
        layer = model.base_model.model.first
        WAYS[way](layer, part, module)
        assert getattr(layer, part)["default"] is module and module is layer.get_submodule(f"{part}.default")
    equal(ours, theirs, before)
    adapter, layer = ours.base_model.model.first.adapter("default"), ours.base_model.model.first
    module = getattr(layer, part)["default"]
    assert adapter.observed is None and module.weight is adapter._parameters[part]
    assert any(parameter is module.weight for parameter in ours.manager.parameters("default"))
    for model in (ours, theirs):
        with torch.no_grad():
            getattr(model.base_model.model.first, part)["default"].weight.mul_(2)
        getattr(model.base_model.model.first, part)["default"].bias = None
    equal(ours, theirs)
    for model in (ours, theirs):
        getattr(model.base_model.model.first, part)["default"].weight = nn.Parameter(made.weight.detach() * 3)
    equal(ours, theirs)
    equal(copy.deepcopy(ours), theirs)
    ours.manager.rename("default", "renamed")
    assert getattr(layer, part)["renamed"] is module
    ours.manager.rename("renamed", "default")
    for model in (ours, theirs):
        model.merge_adapter()
    equal(ours, theirs)


def test_what_was_put_there_trains_and_is_saved(tmp_path: Path) -> None:
    ours, theirs = both()
    made = linear(4, 6)
    for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        model.base_model.model.first.lora_A["default"] = copy.deepcopy(made)
        model(IDS).square().sum().backward()
        gradient = model.base_model.model.first.lora_A["default"].weight.grad
        assert gradient is not None and gradient.any()
        model.save_pretrained(folder)
    own, given = (peft.load_peft_weights(str(tmp_path / name), device="cpu") for name in ("ours", "theirs"))
    assert own.keys() == given.keys() and all(torch.equal(own[key], given[key]) for key in given)


def test_parts_of_lookups_and_convolutions_act() -> None:
    ours, theirs = both("all")
    before = ours(IDS)
    table = torch.randn(4, 11)
    conv = nn.Conv1d(6, 4, 3, padding=1, bias=False)
    for model in (ours, theirs):
        base = model.base_model.model
        base.table.lora_embedding_A.update({"default": nn.Parameter(table.clone())})
        base.conv.lora_A["default"] = copy.deepcopy(conv)
        base.first.scaling["default"] = 3.0
    assert ours.base_model.model.conv.adapter("default").observed is None
    equal(ours, theirs, before)
    for model in (ours, theirs):
        model.base_model.model.table.lora_embedding_B = nn.ParameterDict(
            {name: nn.Parameter(torch.ones(6, 4)) for name in ("default", "other")}
        )
    equal(ours, theirs)


@pytest.mark.parametrize("dropout", [nn.Identity(), nn.Dropout(1.0)])
def test_a_dropout_acts(dropout: nn.Module) -> None:
    ours, theirs = both()
    for model in (ours.train(), theirs.train()):
        model.base_model.model.first.lora_dropout["default"] = copy.deepcopy(dropout)
    equal(ours, theirs)
    assert ours.base_model.model.first.adapter("default").observed is None
    ours.base_model.model.first.lora_dropout["default"].p = 0.5
    assert ours.base_model.model.first.adapter("default").dropout == 0.5


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Around(nn.Module):
    """A module around the one that was there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def _doubled(layer: Any) -> None:
    layer.lora_A["default"] = Doubled(6, 4, bias=False)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.arange(24.0).view(4, 6) / 24)


def _around(layer: Any) -> None:
    layer.lora_B["default"] = Around(layer.lora_B["default"])


def _halved(layer: Any) -> None:
    layer.lora_dropout["default"] = Halved()


def _hooked(layer: Any) -> None:
    module = linear(4, 6)
    with torch.no_grad():
        module.weight.copy_(torch.arange(24.0).view(4, 6) / 24)
    module.register_forward_hook(lambda _, args, output: output + 1)
    layer.lora_A["default"] = module


@pytest.mark.parametrize("put", [_doubled, _around, _halved, _hooked])
def test_a_module_of_ones_own_is_called(put: Callable[[Any], None]) -> None:
    ours, theirs = both()
    before = ours(IDS)
    for model in (ours, theirs):
        put(model.base_model.model.first)
    equal(ours, theirs, before)
    equal(copy.deepcopy(ours), theirs)
    names = ["default", "other"]
    with torch.no_grad():
        assert_close(ours(IDS, adapter_names=names), theirs(IDS, adapter_names=names))
    for model in (ours, theirs):
        model.base_model.model.first.lora_A["default"] = linear(4, 6).requires_grad_()
        nn.init.ones_(model.base_model.model.first.lora_A["default"].weight)
    equal(ours, theirs)


def test_a_module_that_need_not_be_a_product_is_not_merged() -> None:
    ours, _ = both()
    _around(ours.base_model.model.first)
    with pytest.raises(MergeError, match=r"first: .* whose lora_B is of the class Around"):
        ours.merge_adapter()


class Shifted(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 1


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(("config", "layer"), [("linear", "first"), ("bias", "first"), ("all", "conv")])
def test_another_forward_of_a_part_acts(config: str, layer: str, part: str) -> None:
    ours, theirs = both(config)
    before = ours(IDS)
    for model in (ours, theirs):
        add_hook_to_module(getattr(getattr(model.base_model.model, layer), part)["default"], Shifted(), append=True)
    equal(ours, theirs, before)
    ours, theirs = both(config)
    for model in (ours, theirs):
        module = getattr(getattr(model.base_model.model, layer), part)["default"]
        module.forward = lambda x, old=module.forward: old(x) * 2
    equal(ours, theirs, before)


def test_what_would_not_act_is_refused_in_one_line() -> None:
    ours, _ = both()
    layer = ours.base_model.model.first
    before = ours(IDS)
    for name, module, reason in (
        ("lora_A", linear(4, 6, bias=True), "has bias too"),
        ("lora_A", linear(2, 6), r"shape \(4, 6\), not \(2, 6\)"),
        ("lora_A", nn.Sequential(linear(4, 6), nn.LayerNorm(4)), "has 0.weight too"),
        ("lora_A", nn.Identity(), "has no weight"),
        ("lora_dropout", linear(6, 6), "has weight too"),
        ("lora_A", None, "cannot be a NoneType"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            getattr(layer, name)["default"] = module
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    with pytest.raises(ValueError, match="no adapter 'third'"):
        layer.lora_A["third"] = linear(4, 6)
    with pytest.raises(ValueError, match=r"delete_adapter\(\)"):
        del layer.lora_A["default"]
    with pytest.raises(ValueError, match="one entry for each adapter"):
        layer.lora_A = linear(4, 6)
    ours_dora, _ = pair("dora")
    with pytest.raises(ValueError, match="cannot be a Doubled, which would not be called"):
        ours_dora.base_model.model.first.lora_A["default"] = Doubled(6, 4, bias=False)
    assert torch.equal(ours(IDS), before)
    assert list(layer.lora_A) == ["default", "other"]


def test_a_part_of_another_adapter_has_its_numbers() -> None:
    ours, theirs = both()
    for model in (ours, theirs):
        layer = model.base_model.model.first
        layer.lora_A["default"], layer.lora_dropout["default"] = layer.lora_A["other"], layer.lora_dropout["other"]
    equal(ours, theirs)


SAMPLES = {
    f"{method.label}-{name}": (method.config_class, fields)
    for method in methods()
    for name, fields in list(method.sample_configs.items())[:1]
    if not method.transforms_calls
}


@pytest.mark.drawn(20)
@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_written_acts_with_every_method_or_is_refused(sample: str) -> None:
    made: tuple[type[AdapterConfig], Any] = SAMPLES[sample]
    x = torch.randn(3, 16)

    def model() -> Any:
        torch.manual_seed(0)
        fields = {"target_modules": ["target"], "feedforward_modules": []}
        known = made[0].__dataclass_fields__
        config = made[0](**{key: value for key, value in fields.items() if key in known} | dict(made[1]))
        base = nn.Sequential()
        base.add_module("target", nn.Linear(16, 16))
        adapted = nbpeft.get_peft_model(base, config).eval()
        for parameter in adapted.manager.parameters("default"):
            nn.init.normal_(parameter, std=0.3)
        return adapted

    layer = next(iter(model().manager.layers.values()))
    for name, mapping in dict(layer.named_children()).items():
        if not isinstance(mapping, ShownParts | ParameterMapping) or "default" not in mapping:
            continue
        new, other = model(), model()
        part = getattr(next(iter(new.manager.layers.values())), name)
        expected = getattr(next(iter(other.manager.layers.values())), name)["default"]
        if isinstance(part, ParameterMapping):
            part["default"] = nn.Parameter(part["default"].detach() * 2)
            expected.data.mul_(2)
        elif isinstance(expected, nn.Linear):
            plain = nn.Linear(expected.weight.shape[1], len(expected.weight), bias=expected.bias is not None)
            plain.load_state_dict({key: value * 2 for key, value in expected.state_dict().items()})
            part["default"] = plain
            for parameter in expected.parameters():
                parameter.data.mul_(2)
        elif isinstance(expected, nn.Dropout) and layer.adapter("default").computes_by_parts:
            part["default"] = Halved()
            expected.forward = Halved().forward  # type: ignore[method-assign, assignment]
        else:
            with pytest.raises(AdapterError):
                part["default"] = Halved()
            continue
        with torch.no_grad():
            assert_close(new(x), other(x))
