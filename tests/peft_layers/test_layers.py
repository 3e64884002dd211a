"""PEFT's attributes of one adapted layer: read, written, and with peft's own numbers."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nbpeft
from nbpeft.engine.hotswap import prepare_for_hotswap
from nbpeft.errors import AdapterError, BaseMismatchError, MergeError, UnknownAdapterError
from nbpeft.model import LoraConfig, LoraLayer, ModulesToSaveWrapper, get_peft_model
from nbpeft.peft_layers.shared_tensors import shared_by_name
from tests.closeness import assert_close, differ

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], "init_lora_weights": False}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.table(ids))


def pair(**changes: Any) -> tuple[Any, Any]:
    """The same adapter here and in peft."""
    torch.manual_seed(0)
    base = Small().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{**SETTINGS, **changes})).eval()
    ours = get_peft_model(base, LoraConfig(**{**SETTINGS, **changes})).eval()
    theirs_layers, ours_layers = layers(theirs), layers(ours)
    for path, layer in ours_layers.items():
        for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
            if "default" in getattr(layer, name, ()):
                getattr(layer, name)["default"].weight.data.copy_(getattr(theirs_layers[path], name)["default"].weight)
    return ours, theirs


def layers(model: Any) -> dict[str, Any]:
    wanted = ("inner.0", "inner.2", "table")
    found = {path: model.get_base_model().get_submodule(path) for path in wanted}
    return {path: layer for path, layer in found.items() if hasattr(layer, "base_layer")}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(11).view(1, 11))


def scale_everywhere(model: Any, method: str, *arguments: Any) -> None:
    for layer in layers(model).values():
        getattr(layer, method)(*arguments)


def test_scalings_that_are_written_act() -> None:
    ours, theirs = pair()
    before = output(ours)
    for model in (ours, theirs):
        for layer in layers(model).values():
            layer.scaling["default"] = 0.5
    assert differ(output(ours), before)
    assert_close(output(ours), output(theirs))
    for model in (ours, theirs):
        for layer in layers(model).values():
            layer.scaling = {"default": 2.0}
    assert_close(output(ours), before)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"0": 3}}])
def test_layers_scale_and_unscale_as_in_peft(changes: dict[str, Any]) -> None:
    ours, theirs = pair(**changes)
    steps: list[tuple[Any, ...]] = [
        ("scale_layer", 2),
        ("scale_layer", 0.7),
        ("unscale_layer", 2),
        ("set_scale", "default", 3),
        ("set_scale", "nobody", 9),
        ("unscale_layer", None),
    ]
    for step in steps:
        for model in (ours, theirs):
            scale_everywhere(model, *step)
        for path, layer in layers(ours).items():
            assert layer.scaling["default"] == pytest.approx(layers(theirs)[path].scaling["default"]), step
        assert_close(output(ours), output(theirs))


def test_layers_with_trained_token_rows_have_nothing_to_scale() -> None:
    ours, _ = pair(trainable_token_indices={"table": [1, 2]})
    table, linear = layers(ours)["table"], layers(ours)["inner.0"]
    before = table(torch.arange(3))
    scale_everywhere(ours, "set_scale", "default", 3)
    scale_everywhere(ours, "scale_layer", 2)
    assert linear.scaling["default"] == 12.0 and not list(getattr(table, "scaling", ()))
    assert torch.equal(table(torch.arange(3)), before)
    scale_everywhere(ours, "unscale_layer")
    assert linear.scaling["default"] == 2.0


@pytest.mark.parametrize(
    "other",
    [
        nbpeft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        nbpeft.OFTConfig(target_modules=["0"], oft_block_size=2),
    ],
)
def test_a_scale_without_effect_is_named(other: Any) -> None:
    """PEFT raises AttributeError for some methods, and warns for others."""
    layer: Any = nbpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), other).get_base_model()[0]
    for method, *arguments in (("set_scale", "default"), ("scale_layer",)):
        with pytest.warns(UserWarning, match="a scale of 0.5 has no effect on adapter 'default': .* has no scaling"):
            getattr(layer, method)(*arguments, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(layer, method)(*arguments, 1)


def test_only_active_adapters_are_scaled() -> None:
    ours, _ = pair()
    ours.add_adapter("other", LoraConfig(**SETTINGS))
    scale_everywhere(ours, "scale_layer", 2)
    assert layers(ours)["inner.0"].scaling.copy() == {"default": 4.0, "other": 2.0}
    assert layers(ours)["inner.0"].active_adapters == ["default"]


def test_a_scaling_held_as_a_tensor_is_written_in_place() -> None:
    ours, _ = pair()
    prepare_for_hotswap(ours.manager, 6)
    held = layers(ours)["inner.0"].scaling["default"]
    scale_everywhere(ours, "set_scale", "default", 3)
    assert held is layers(ours)["inner.0"].scaling["default"] and float(held) == 6.0
    scale_everywhere(ours, "unscale_layer")
    assert float(held) == 2.0


def test_factors_are_read_and_replaced_by_name() -> None:
    ours, theirs = pair(target_modules=["0", "table"], lora_dropout=0.25)
    for path, layer in layers(ours).items():
        other = layers(theirs)[path]
        assert layer.r["default"] == other.r["default"] == 4
        assert "default" in layer.scaling and list(layer.scaling) == ["default"]
        assert layer.get_base_layer() is layer.base_layer
    table = layers(ours)["table"]
    assert table.lora_embedding_A["default"].shape == (4, 11) == layers(theirs)["table"].lora_embedding_A.default.shape
    assert isinstance(table.lora_embedding_B.default, nn.Parameter)
    linear = layers(ours)["inner.0"]
    assert linear.lora_A.default.weight.shape == (4, 6) and linear.lora_B["default"].bias is None
    linear.lora_B["default"].weight = torch.zeros(8, 4)
    assert not linear.adapters["default"].lora_B.any() and linear.lora_B["default"].weight.requires_grad
    with pytest.raises(ValueError, match="must have shape"):
        linear.lora_B["default"].weight = torch.zeros(7, 4)
    assert linear.lora_dropout["default"].p == layers(theirs)["inner.0"].lora_dropout["default"].p == 0.25
    linear.lora_dropout["default"].p = 0.5
    assert linear.adapters["default"].dropout == 0.5


def test_the_bias_of_lora_bias_is_found() -> None:
    ours, theirs = pair(lora_bias=True)
    ours_bias, theirs_bias = (layers(model)["inner.0"].lora_B["default"].bias for model in (ours, theirs))
    assert ours_bias.shape == theirs_bias.shape == (8,)


@pytest.mark.parametrize("use_dora", [False, True])
def test_delta_weights(use_dora: bool) -> None:
    ours, theirs = pair(use_dora=use_dora)
    layer, other = layers(ours)["inner.0"], layers(theirs)["inner.0"]
    before = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default")
    ours.merge_adapter()
    assert_close(layer.base_layer.weight - before, delta)
    assert layer.merged_adapters == ["default"]
    if use_dora:
        assert layer.lora_magnitude_vector["default"].weight.shape == (8,)
    else:
        assert_close(delta, other.get_delta_weight("default").detach())
    with pytest.raises(UnknownAdapterError, match="Did you mean 'default'"):
        layer.get_delta_weight("defualt")


def test_attributes_that_nobody_has_are_missing() -> None:
    layer = layers(pair()[0])["inner.0"]
    assert len(layer.lora_magnitude_vector) == len(layer.lora_embedding_A) == 0  # as in peft
    assert not hasattr(layer, "nonsense") and not hasattr(layer.scaling, "nonsense")
    assert not hasattr(layer, "factors") and not hasattr(layer, "delta_weight") and not hasattr(layer, "reads_weight")
    with pytest.raises(TypeError, match="delete_adapter"):
        del layer.scaling["default"]


def test_attributes_of_the_frozen_layer_come_first() -> None:
    base = Small()
    base.inner[0].__dict__["dropout"] = 0.75
    layer = layers(get_peft_model(base, LoraConfig(target_modules=["0"])))["inner.0"]
    assert layer.dropout == 0.75


def test_every_tensor_of_the_family_is_named_as_such() -> None:
    for options in ({}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["inner.0"]}):
        for model in pair(**options):
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            assert trained and all("lora_" in name for name in trained)


def test_adapted_layers_are_found_by_peft_s_classes() -> None:
    ours, theirs = pair(modules_to_save=["inner.2"], target_modules=["inner.0"])
    for model, adapted, copied in (
        (ours, LoraLayer, ModulesToSaveWrapper),
        (theirs, peft.tuners.lora.LoraLayer, peft.utils.ModulesToSaveWrapper),
    ):
        layers_ = [module for module in model.modules() if isinstance(module, adapted)]
        copies = [module for module in model.modules() if isinstance(module, copied)]
        assert len(layers_) == len(copies) == 1 and layers_[0].r == {"default": 4}
        assert copies[0].active_adapters == ["default"] and not layers_[0].disable_adapters
        with model.disable_adapter():
            assert layers_[0].disable_adapters


@pytest.mark.parametrize("changes", [{"modules_to_save": ["inner"]}, {"trainable_token_indices": {"table": [1]}}])
def test_layers_of_the_wrong_kind_raise_what_peft_raises(changes: dict[str, Any]) -> None:
    base = nn.ModuleDict({"table": nn.Embedding(4, 4), "inner": nn.ModuleList([nn.Linear(4, 4)])})
    base["other"] = nn.Sequential(nn.Linear(4, 4))
    for library in (nbpeft, peft):
        settings = library.LoraConfig(target_modules=["table", "other.0"], **changes)
        with pytest.raises(TypeError):
            library.get_peft_model(copy.deepcopy(base), settings)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_print_as_what_peft_calls_them() -> None:
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4), "c": nn.Conv2d(3, 4, 1), "d": Conv1D(2, 4)})
    names = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(target_modules=list("abcd")))
        names.append([repr(model.base_model.model[key]).partition("(")[0] for key in "abcd"])
    assert names[0] == names[1] == ["lora.Linear", "lora.Embedding", "lora.Conv2d", "lora.Linear"]


def test_base_weights_are_written_as_in_peft() -> None:
    ours, theirs = pair()
    new = torch.linspace(-1, 1, layers(ours)["inner.0"].get_base_weight().numel())
    for model in (ours, theirs):
        layer = layers(model)["inner.0"]
        layer.set_base_weight(new.reshape(layer.get_base_weight().shape))
    assert torch.equal(layers(ours)["inner.0"].get_base_weight(), layers(theirs)["inner.0"].get_base_weight())
    assert_close(output(ours), output(theirs))


def test_base_weights_that_cannot_be_written_stay() -> None:
    model, _ = pair()
    layer = layers(model)["inner.0"]
    before = layer.get_base_weight().clone()
    with pytest.raises(BaseMismatchError, match=r"not \(1, 1\)"):
        layer.set_base_weight(torch.zeros(1, 1))
    assert torch.equal(layer.get_base_weight(), before)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge before writing base weights"):
        layer.set_base_weight(before)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_weight(), before)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_tell_how_they_store_their_weight() -> None:
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4), "d": Conv1D(2, 4)})
    for library in (nbpeft, peft):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(target_modules=list("abd")))
        assert [model.base_model.model[key].fan_in_fan_out for key in "abd"] == [False, False, True]


KINDS: dict[str, Any] = {"a": nn.Linear, "d": Conv1D}


@pytest.mark.parametrize(
    ("targets", "given", "warns"),
    [("d", False, 0), ("d", True, 0), ("a", True, 1), ("b", True, 0), ("ad", False, 0), ("da", True, 0)],
)
def test_the_config_tells_how_the_layers_store_their_weight_as_in_peft(targets: str, given: bool, warns: int) -> None:
    base = nn.ModuleDict({"b": nn.Embedding(4, 4), **{key: KINDS[key](4, 4) for key in targets if key in KINDS}})
    found = []
    for library in (peft, nbpeft):
        config = library.LoraConfig(target_modules=list(targets), fan_in_fan_out=given)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = library.get_peft_model(copy.deepcopy(base), config)
        found.append([config.fan_in_fan_out, model.peft_config["default"].fan_in_fan_out])
    assert found[0] == found[1]
    assert sum("fan_in_fan_out is set to False: the layers" in str(one.message) for one in told) == warns


def test_layers_and_copies_tell_the_adapters_they_have() -> None:
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    for library in (nbpeft, peft):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(target_modules=["a"]))
        model.add_adapter("more", library.LoraConfig(target_modules=["a", "b"], modules_to_save=["c"]))
        inner = model.base_model.model
        assert [inner[key]._get_available_adapters() for key in "abc"] == [{"default", "more"}, {"more"}, {"more"}]


def test_what_is_shown_by_adapter_is_written_as_a_dictionary() -> None:
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    assert json.loads(json.dumps([layer.scaling, layer.r])) == [{"default": 4.0}, {"default": 2}]
    assert [dict(layer.r), {**layer.r}, copy.copy(layer.r), layer.r | {}] == [{"default": 2}] * 4


@pytest.mark.parametrize("library", [nbpeft, peft])
def test_attributes_by_adapter_are_compared_and_joined_as_dictionaries(library: Any) -> None:
    config = library.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    layer = library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model.model[0]
    scaling = layer.scaling
    other = scaling != {"default": 2.0}
    assert not other and scaling != {"default": 1.0} and scaling != {}
    assert scaling | {"a": 1.0} == {"default": 2.0, "a": 1.0} == {"a": 1.0} | scaling
    assert list(reversed(scaling)) == ["default"]
    scaling |= {"default": 3.0}
    assert layer.scaling == {"default": 3.0}


@pytest.mark.parametrize("library", [nbpeft, peft])
def test_what_is_active_on_one_layer_is_written_where_peft_keeps_it(library: Any) -> None:
    config = library.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model = library.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    model.add_adapter("other", config)
    layer, x = model.base_model.model[0], torch.ones(1, 4)
    first = layer(x)
    layer._active_adapter = "other"
    assert layer.active_adapters == ["other"] and layer._active_adapter == "other"
    assert not torch.equal(layer(x), first) and model.base_model.model[1].active_adapters == ["default"]
    assert model.get_model_status().active_adapters == "irregular"
    layer._disable_adapters = True
    assert layer.disable_adapters and layer._disable_adapters and torch.equal(layer(x), layer.base_layer(x))
    assert model.get_model_status().enabled == "irregular"
    layer._disable_adapters = False
    assert layer.active_adapters == ["other"] and not torch.equal(layer(x), layer.base_layer(x))
    model.set_adapter("default")
    assert layer.active_adapters == ["default"] and torch.equal(layer(x), first)


@pytest.mark.parametrize("name", ["lora_A", "lora_embedding_A"])
def test_a_parameter_that_an_adapter_lacks_cannot_be_written(name: str) -> None:
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    key = "default" if "embedding" in name else "other"
    with pytest.raises(AdapterError, match=f"no adapter '{key}'"):
        getattr(layer, name)[key] = nn.Parameter(torch.zeros(2, 4)) if "embedding" in name else nn.Linear(4, 2)
    assert list(layer.lora_A) == ["default"] and not layer.lora_embedding_A


class Shared(nn.Module):
    """The state that layers of one adapter share."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([value]))
        self.register_buffer("drawn", torch.tensor([value]))


def test_what_layers_share_is_found_by_the_name_of_a_parameter_or_a_buffer() -> None:
    states: dict[str, Any] = {"one": Shared(1.0), "other": Shared(2.0), "without": nn.Module()}
    for name in ("trained", "drawn"):
        view: Any = shared_by_name(states, name)
        assert view is not None and dict(view) == {key: getattr(states[key], name) for key in ("one", "other")}
    assert shared_by_name(states, "training") is None
    view = shared_by_name(states, "drawn")
    assert view is not None
    view["one"] = torch.tensor([3.0])
    assert states["one"].drawn.tolist() == [3.0] and states["other"].drawn.tolist() == [2.0]


def test_layers_with_ia3_tell_whether_their_input_is_scaled_as_in_peft() -> None:
    fields: dict[str, Any] = {"target_modules": ["0", "2"], "feedforward_modules": ["2"]}
    found = []
    for library in (nbpeft, peft):
        model: Any = library.get_peft_model(Small(), library.IA3Config(**fields))
        inner = model.base_model.model.inner
        found.append([inner[0].is_feedforward, inner[2].is_feedforward])
    assert found[0] == found[1] == [False, True]
    other = get_peft_model(Small(), LoraConfig(**SETTINGS))
    assert not hasattr(other.base_model.model.inner[0], "is_feedforward")
