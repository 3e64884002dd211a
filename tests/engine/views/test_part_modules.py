"""The modules with PEFT's names below an adapted layer: their names, what they compute, and what writing them does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.methods.vectors.ia3 import IA3Config
from nbpeft.engine.views.part_modules import LiveParameters, ModuleListing
from nbpeft.engine.views.part_names import shown_name
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import StaleModelError
from nbpeft.model import LoraConfig, LoraLayer, LoraModel, PeftModel, get_peft_model, inject_adapter_in_model
from tests.closeness import assert_close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.second(self.first(self.table(ids)).relu()).mT)


IDS = torch.arange(8).view(2, 4)
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["first"], "lora_dropout": 0.1},
    "all": {"target_modules": ["table", "first", "second", "conv"]},
    "dora": {"target_modules": ["first", "conv", "table"], "use_dora": True},
    "bias": {"target_modules": ["first"], "lora_bias": True},
    "copies": {"target_modules": ["first"], "modules_to_save": ["second"]},
}


def pair(name: str = "all", adapters: tuple[str, ...] = ("default",)) -> tuple[Any, Any]:
    """The same base with adapters of the same config here and in peft, their numbers different."""
    torch.manual_seed(0)
    base = Net().eval()
    settings = {"r": 4, "init_lora_weights": False, **CONFIGS[name]}
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings), adapters[0])
    ours: Any = get_peft_model(base, LoraConfig(**settings), adapters[0])
    for other in adapters[1:]:
        theirs.add_adapter(other, peft.LoraConfig(**settings))
        ours.add_adapter(other, LoraConfig(**settings))
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*cannot be merged")
def test_parameters_and_state_dicts_have_pefts_names(name: str) -> None:
    ours, theirs = pair(name, ("default", "other"))
    assert {key for key, _ in ours.named_parameters()} == {key for key, _ in theirs.named_parameters()}
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    ours.load_state_dict(expected)
    with torch.no_grad():
        assert_close(ours(IDS), theirs(IDS))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**expected, "base_model.model.first.lora_A.third.weight": torch.zeros(4, 6)})
    del expected["base_model.model.first.lora_A.default.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(expected)


def test_modules_are_listed_and_found_by_pefts_paths() -> None:
    ours, theirs = pair("linear")
    assert {path for path, _ in ours.named_modules()} <= {path for path, _ in theirs.named_modules()}
    found = [path for path, module in ours.named_modules() if hasattr(module, "lora_A")]
    assert found == ["base_model.model.first"]
    factor = ours.get_submodule("base_model.model.first.lora_A.default")
    layer = ours.base_model.model.first
    assert factor is layer.lora_A["default"] is layer.lora_A.default and isinstance(factor, nn.Linear)
    assert isinstance(layer.lora_A, nn.ModuleDict) and isinstance(layer.lora_embedding_A, nn.ParameterDict)
    assert len(layer.lora_embedding_A) == len(layer.lora_magnitude_vector) == 0
    assert ours.get_parameter("base_model.model.first.lora_A.default.weight") is factor.weight
    assert isinstance(ours.base_model, LoraModel) and isinstance(layer, LoraLayer)
    assert ours.prefix == theirs.prefix == "lora_" and f"{ours.peft_type}" == f"{theirs.peft_type}"


@pytest.mark.parametrize("name", ["linear", "bias", "all"])
@pytest.mark.filterwarnings("ignore:.*cannot be merged")
def test_factors_compute_as_pefts(name: str) -> None:
    ours, theirs = pair(name)
    ours.load_state_dict(theirs.state_dict())
    for path in ("first", "conv"):
        layer, other = ours.get_base_model().get_submodule(path), theirs.get_base_model().get_submodule(path)
        if not hasattr(layer, "lora_A"):
            continue
        x = torch.randn(2, 6, 5) if path == "conv" else torch.randn(3, 6)
        hidden = layer.lora_A["default"](layer.lora_dropout["default"](x))
        assert_close(hidden, other.lora_A["default"](x))
        assert_close(layer.lora_B["default"](hidden), other.lora_B["default"](hidden))
        for factor in ("lora_A", "lora_B"):
            mine, its = getattr(layer, factor)["default"], getattr(other, factor)["default"]
            features = ("in_channels", "out_channels") if path == "conv" else ("in_features", "out_features")
            assert all(getattr(mine, one) == getattr(its, one) for one in features)
            assert repr(mine) == repr(its)


def test_what_is_written_acts() -> None:
    ours, _ = pair("linear")
    layer = ours.base_model.model.first
    before = ours(IDS)
    layer.lora_B["default"].weight.data.zero_()
    frozen = ours(IDS)
    assert not torch.equal(before, frozen)
    layer.lora_B["default"].weight = torch.ones(8, 4)
    assert not torch.equal(ours(IDS), frozen) and layer.adapter("default").lora_B.requires_grad
    layer.lora_B["default"].requires_grad_(False)
    assert not layer.adapter("default").lora_B.requires_grad
    layer.lora_A["default"].to(torch.float64)
    assert layer.adapter("default").lora_A.dtype == torch.float64
    layer.lora_dropout["default"].p = 0.75
    assert layer.adapter("default").dropout == 0.75
    assert isinstance(layer.scaling, dict)
    layer.scaling["default"] = 0.0
    assert_close(ours(IDS), frozen)


def test_functional_calls_replace_parameters_for_their_time() -> None:
    ours, _ = pair("all")
    before = ours(IDS)
    zeros = {name: torch.zeros_like(value) for name, value in ours.named_parameters() if "lora_" in name}
    alone = torch.func.functional_call(ours, zeros, (IDS,))
    assert_close(ours(IDS), before)
    with ours.disable_adapter():
        assert_close(alone, ours(IDS))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_modules_of_their_own(twin_of: Any) -> None:
    ours, _ = pair("linear")
    factor = ours.base_model.model.first.lora_A["default"]
    twin = twin_of(ours)
    other = twin.base_model.model.first.lora_A["default"]
    assert other is not factor and type(twin.base_model).__name__ == "LoraModel"
    assert other.weight is twin.base_model.model.first.adapter("default").lora_A is not factor.weight


def test_modules_follow_their_adapters() -> None:
    ours, _ = pair("linear", ("default", "other"))
    layer = ours.base_model.model.first
    held, factor = layer.lora_A, layer.lora_A["other"]
    ours.manager.rename("other", "third")
    assert list(layer.lora_A) == ["default", "third"] and layer.lora_A["third"] is factor
    ours.delete_adapter("default")
    assert list(held) == ["third"] and layer.lora_A is held
    assert [name for name, _ in ours.named_parameters() if "lora_A" in name] == [
        "base_model.model.first.lora_A.third.weight"
    ]
    adapter = weakref.ref(layer.adapter("third"))
    del factor, layer
    ours.delete_adapter("third")
    gc.collect()
    assert adapter() is None and not held


@pytest.mark.parametrize("first", ["lora", "adalora"])
def test_one_name_can_be_a_module_of_one_method_and_a_parameter_of_another(first: str) -> None:
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=["first"], r=2, init_lora_weights=False),
        "adalora": nbpeft.AdaLoraConfig(target_modules=["first"], init_r=3, total_step=5, init_lora_weights=False),
    }
    second = "lora" if first == "adalora" else "adalora"
    model = get_peft_model(Net(), configs[first], first)
    layer: Any = model.base_model.model.first
    assert "lora_A" in str([name for name, _ in model.named_parameters()])
    model.add_adapter(second, configs[second])
    names = {"base_model.model.first.lora_A.lora.weight", "base_model.model.first.lora_A.adalora"}
    assert names == {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert names <= model.state_dict().keys() and len(layer.lora_A) == 2 and "lora_A" in repr(model)
    assert set(layer.lora_A) == set(layer.lora_A.keys()) == {"lora", "adalora"} and "lora" in layer.lora_A
    assert layer.lora_A["lora"].weight.shape == (2, 6) and layer.lora_A["adalora"].shape == (3, 6)
    assert len(layer.lora_A.values()) == len(layer.lora_A.items()) == 2
    before = model(IDS)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(model(IDS), before)
    held = layer.lora_A
    model.delete_adapter(first)
    assert set(layer.lora_A) == {second} and set(held) <= {second}
    model.delete_adapter(second)
    assert not held and not hasattr(layer, "lora_A")


def test_a_layer_prints_as_in_peft() -> None:
    ours, theirs = pair("linear")
    lines = repr(ours).splitlines()
    assert set(lines) <= set(repr(theirs).splitlines())
    assert any("(lora_A): ModuleDict(" in line for line in lines)


def test_ia3_has_its_own_class_and_names() -> None:
    ours: Any = get_peft_model(Net(), IA3Config(target_modules=["first"], feedforward_modules=[]))
    assert type(ours.base_model).__name__ == "IA3Model" and not isinstance(ours.base_model, LoraModel)
    assert ours.prefix == "ia3_" and isinstance(ours.base_model.model.first.ia3_l, nn.ParameterDict)
    assert "base_model.model.first.ia3_l.default" in dict(ours.named_parameters())


def test_plain_tensors_can_stand_in_for_parameters() -> None:
    """As FSDP does it while a module runs."""
    layer = pair("all")[0].base_model.model
    for holder, name, own in (
        (layer.first.lora_A["default"], "weight", "lora_A"),
        (layer.table.lora_embedding_A, "default", ""),
    ):
        parameter = getattr(holder, name)
        adapter = (layer.first if own else layer.table).adapter("default")
        delattr(holder, name)
        assert not list(holder.parameters())
        setattr(holder, name, parameter.detach() * 2)
        assert torch.equal(getattr(holder, name), adapter.__dict__[own or "lora_embedding_A"])
        delattr(holder, name)
        setattr(holder, name, parameter)
        assert getattr(holder, name) is parameter is adapter._parameters[own or "lora_embedding_A"]


def test_a_parameter_keeps_its_shape() -> None:
    live = pair("linear")[0].base_model.model.first.lora_A["default"]._parameters
    assert isinstance(live, LiveParameters) and list(live) == ["weight"] and len(live) == 1
    with pytest.raises(ValueError, match=r"lora_A must have shape \(4, 6\), not \(2, 6\)"):
        live["weight"] = nn.Parameter(torch.zeros(2, 6))


def test_names_of_parameters_below_a_layer() -> None:
    adapter = pair("bias")[0].base_model.model.first.adapter("default")
    assert shown_name(adapter, "lora_A", "one") == "lora_A.one.weight"
    assert shown_name(adapter, "lora_B_bias", "one") == "lora_B.one.bias"
    assert shown_name(adapter, "other", "one") == "other.one"


def test_token_rows_hang_where_peft_has_them() -> None:
    settings: dict[str, Any] = {"target_modules": ["first"], "trainable_token_indices": {"table": [1, 2]}}
    ours, theirs = (
        get_peft_model(Net(), LoraConfig(**settings)),
        peft.get_peft_model(Net(), peft.LoraConfig(**settings)),
    )
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]
    table: Any = ours.get_base_model().get_submodule("table")
    assert table.token_adapter.trainable_tokens_delta["default"].shape == (2, 6)


# Commands on one layer


def test_a_layer_can_be_switched_by_itself() -> None:
    ours, theirs = pair("all", ("default", "other"))
    ours.load_state_dict(theirs.state_dict())
    layers = [model.base_model.model.first for model in (ours, theirs)]
    for step in ("enable_adapters", "set_adapter", "set_adapter"):
        for layer in layers:
            layer.enable_adapters(False) if step == "enable_adapters" else layer.set_adapter("other")
            assert layer.disable_adapters is (step == "enable_adapters") or step == "set_adapter"
        if step == "set_adapter":
            for layer in layers:
                layer.enable_adapters(True)
        assert_close(ours(IDS), theirs(IDS))
        grads = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (ours, theirs)]
        assert grads[0] == grads[1]
    assert layers[0].active_adapters == ["other"] and ours.active_adapters == ["default"]
    ours.set_adapter("default")
    assert layers[0].active_adapters == ["default"]


def test_switching_every_layer_alike_switches_the_model() -> None:
    ours, theirs = pair("all", ("default", "other"))
    ours.load_state_dict(theirs.state_dict())
    for module in ours.modules():
        if isinstance(module, AdaptedLayer):
            module.set_adapter("other")
    switched = ours(IDS)
    with ours.disable_adapter():
        pass
    assert ours.active_adapters == ["other"]
    theirs.set_adapter("other")
    assert_close(switched, theirs(IDS))
    assert_close(ours(IDS), switched)


def test_layers_that_differ_are_told_of_and_enabled() -> None:
    ours, _ = pair("all")
    ours.base_model.model.first.enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), ours.disable_adapter():
        pass
    assert not ours.base_model.model.first.disable_adapters


def test_a_layer_merges_and_unmerges_by_itself() -> None:
    ours, theirs = pair("linear")
    ours.load_state_dict(theirs.state_dict())
    layer, other = ours.base_model.model.first, theirs.base_model.model.first
    before = layer.get_base_weight().clone()
    for one in (layer, other):
        one.merge(safe_merge=True, adapter_names=["default"])
        assert one.merged is True and one.merged_adapters == ["default"]
    assert_close(layer.get_base_weight(), other.get_base_weight())
    assert_close(ours(IDS), theirs(IDS))
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        layer.merge()
    layer.unmerge()
    assert layer.merged is False and torch.equal(layer.get_base_weight(), before) and not ours.manager.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.adapter("default").lora_A.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), before) and not layer.merged


def test_layers_that_are_not_merged_call_the_selected_adapters() -> None:
    ours, theirs = pair("all", ("default", "other"))
    ours.load_state_dict(theirs.state_dict())
    layers = [model.base_model.model.first for model in (ours, theirs)]
    before = ours(IDS)
    for layer in layers:
        layer.merge(adapter_names=["other"])
    assert ours.active_adapters == ["default"] and not torch.equal(ours(IDS), before)
    assert_close(ours(IDS), theirs(IDS))
    layers[0].unmerge()
    assert torch.equal(ours(IDS), before)


def test_a_bias_that_would_not_stay_finite_is_not_merged() -> None:
    ours: Any = get_peft_model(Net(), IA3Config(target_modules=["first"], feedforward_modules=[]))
    layer = ours.base_model.model.first
    layer.base_layer.bias.data.fill_(torch.finfo(torch.float32).max)
    layer.ia3_l["default"].data.fill_(3)
    with pytest.raises(ValueError, match="NaNs detected in the merged bias"):
        layer.merge(safe_merge=True)
    assert layer.base_layer.bias.isfinite().all()


def test_an_adapter_is_taken_out_of_one_layer() -> None:
    ours, _ = pair("all", ("default", "other"))
    layer = ours.base_model.model.first
    layer.delete_adapter("other")
    layer.delete_adapter("nobody")
    assert layer._all_available_adapter_names() == ["default"] and "other" in ours.base_model.model.second.lora_A
    assert len(ours.manager.parameters("other")) == 2 * 3
    layer.set_requires_grad(["default", "nobody"], False)
    assert not layer.lora_A["default"].weight.requires_grad


def test_settings_of_a_layer_are_pefts() -> None:
    ours, theirs = pair("bias")
    layer, other = ours.base_model.model.first, theirs.base_model.model.first
    for name in ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias"):
        assert dict(getattr(layer, name)) == dict(getattr(other, name)), name
    assert set(layer.adapter_layer_names) <= set(other.adapter_layer_names) | {"lora_magnitude_vector"}
    assert set(layer.other_param_names) <= {*other.other_param_names, "use_dora", "use_rslora", "lora_bias", "scaling"}


def test_a_layer_without_its_model_says_so() -> None:
    ours, _ = pair("linear")
    layer = ours.base_model.model.first
    del ours
    gc.collect()
    with pytest.raises(StaleModelError, match="a model that no longer exists"):
        layer.merge()


# What is built on the meta device


@pytest.mark.parametrize("inject", [True, False])
def test_adapters_are_built_without_data_and_filled_in(inject: bool) -> None:
    ours, _ = pair("dora")
    tensors = nbpeft.get_peft_model_state_dict(ours)
    config = LoraConfig(**{"r": 4, **CONFIGS["dora"]})
    torch.manual_seed(0)
    base = Net().eval()
    model = (
        inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
        if inject
        else get_peft_model(base, config, low_cpu_mem_usage=True)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.is_meta for parameter in trained)
    if inject:
        assert base.peft_config["default"].r == 4  # type: ignore[index,union-attr]
        tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    result = nbpeft.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    assert not result.unexpected_keys and not any(parameter.is_meta for parameter in model.parameters())
    assert_close(model.eval()(IDS), ours(IDS))


def test_a_config_given_for_loading_stays_the_models(tmp_path: Any) -> None:
    ours, _ = pair("linear")
    ours.save_pretrained(tmp_path)
    config = LoraConfig(**{"r": 4, **CONFIGS["linear"]})
    loaded = PeftModel.from_pretrained(Net(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    kept = dict(vars(config))
    with pytest.raises(ValueError, match="nowhere"):
        PeftModel.from_pretrained(loaded, tmp_path / "nowhere", config=config)
    assert vars(config) == kept


def test_a_config_given_for_loading_leaves_another_model(tmp_path: Any) -> None:
    config = LoraConfig(**{"r": 4, **CONFIGS["linear"]})
    first = get_peft_model(Net(), config)
    first.save_pretrained(tmp_path)
    assert first.peft_config["default"] is config
    with pytest.raises(ValueError, match="nowhere"):
        PeftModel.from_pretrained(Net(), tmp_path / "nowhere", config=config)
    assert first.peft_config["default"] is config and not config.inference_mode
    loaded = PeftModel.from_pretrained(Net(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    kept = first.peft_config["default"]
    assert kept is not config and not kept.inference_mode and kept.target_modules == {"first"}
    first.save_pretrained(tmp_path / "again")
    other = get_peft_model(Net(), config)
    assert other.peft_config["default"] is not config and loaded.peft_config["default"] is config


@pytest.mark.parametrize("name", ["linear", "bias"])
def test_hooks_on_factors_run_and_change_nothing(name: str) -> None:
    ours, theirs = pair(name)
    theirs.load_state_dict(ours.state_dict())
    runs: dict[Any, list[Any]] = {ours: [], theirs: []}
    expected = ours(IDS)
    for model in (ours, theirs):
        for mapping in (model.first.lora_A, model.first.lora_B, model.first.lora_dropout):
            mapping["default"].register_forward_hook(lambda _, given, out, to=runs[model]: to.append(out.detach()))
    assert_close(ours(IDS), expected)
    theirs(IDS)
    assert len(runs[ours]) == len(runs[theirs]) == 3
    for mine, other in zip(runs[ours], runs[theirs], strict=True):
        assert_close(mine, other)
    twin = copy.deepcopy(ours)
    assert_close(twin(IDS), expected)
    assert twin.first.adapters["default"].observed["lora_A"] is twin.first.lora_A["default"]


def test_hooks_on_all_modules_of_torch_run_for_a_frozen_layer() -> None:
    ours, _ = pair("linear")
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(IDS)
    finally:
        handle.remove()
    assert ours.first.base_layer in seen


def test_hooks_see_gradients_and_mixed_batches() -> None:
    ours, _ = pair("linear", ("default", "other"))
    before = ours(IDS, adapter_names=["default", "other"])
    seen: list[str] = []
    ours.first.lora_B["default"].register_full_backward_hook(lambda *_: seen.append("backward"))
    ours.first.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append("forward"))
    assert_close(ours(IDS, adapter_names=["default", "other"]), before)
    ours(IDS).sum().backward()
    assert seen == ["forward", "forward", "backward"]


@pytest.mark.filterwarnings("ignore:.*cannot be merged")
def test_hooks_that_would_not_run_are_warned_of() -> None:
    ours, _ = pair("dora")
    with pytest.warns(UserWarning, match="put it on the layer"):
        ours.first.lora_A["default"].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(("name", "layer"), [("linear", "first"), ("bias", "first"), ("all", "table"), ("all", "conv")])
@pytest.mark.filterwarnings("ignore:.*cannot be merged")
def test_factors_are_reset_as_in_peft(name: str, layer: str) -> None:
    models = pair(name)
    models[0].load_state_dict(models[1].state_dict())
    kept = [getattr(model, layer) for model in models]
    for init in (False, True):
        for one in kept:
            one.reset_lora_parameters("default", init)
        found = [
            {key: bool(value.any()) for key, value in model.state_dict().items() if "lora" in key} for model in models
        ]
        assert found[0] == found[1]
        assert all(found[0].values()) is not init
    models[0].load_state_dict(models[1].state_dict())
    assert_close(models[0](IDS), models[1](IDS))
    kept[0].reset_lora_parameters("nobody", True)


def test_a_start_in_the_weight_is_not_drawn_anew() -> None:
    ours, _ = pair("linear")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match="starts in the weight"):
        ours.first.reset_lora_parameters("default", "pissa")
    with pytest.raises(ValueError, match="init_lora_weights"):
        ours.first.reset_lora_parameters("default", "gausian")
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_token_rows_tell_their_tokens_and_frozen_rows() -> None:
    settings: dict[str, Any] = {"target_modules": ["first"], "trainable_token_indices": {"table": [7, 3]}}
    base = Net()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    ours: Any = get_peft_model(base, LoraConfig(**settings))
    mine, other = ours.table.token_adapter, theirs.table.token_adapter
    with torch.no_grad():
        mine.trainable_tokens_delta["default"].add_(1.0)
    assert dict(mine.token_indices) == dict(other.token_indices) == {"default": [7, 3]}
    assert_close(mine.trainable_tokens_original["default"], other.trainable_tokens_original["default"])
    with pytest.raises(AttributeError, match="no attribute"):
        _ = mine.nothing


def test_an_injected_adapter_is_replaced_by_one_that_is_loaded(tmp_path: Any) -> None:
    ours, _ = pair("linear")
    ours.save_pretrained(tmp_path)
    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["second"]), copy.deepcopy(ours.unload()))
    with pytest.warns(UserWarning, match="replaces it"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert [path for path, module in base.named_modules() if isinstance(module, AdaptedLayer)] == ["first"]
    assert loaded.peft_config["default"].r == 4  # type: ignore[attr-defined]


def test_hooks_may_change_the_dtype_of_a_factor_for_a_call() -> None:
    ours, _ = pair("linear")
    expected = ours(IDS)
    factor = ours.first.lora_A["default"]
    factor.register_forward_pre_hook(lambda module, _: module.to(torch.float64) and None)
    factor.register_forward_hook(lambda module, _, out: module.to(torch.float32) and out)
    assert_close(ours(IDS), expected)


def test_parameters_stay_the_adapters_where_deepspeed_takes_modules_over() -> None:
    """ZeRO-3 gives every module that it finds a dictionary of its own, notes in it, and asks those with hooks."""
    layer = pair("linear")[0].base_model.model.first
    shown, adapter = layer.lora_A["default"], layer.adapter("default")
    live = shown._parameters
    shown._parameters = dict(live)
    live._in_forward = True
    assert shown._parameters is live and shown.weight is adapter.lora_A
    assert adapter.ds_external_parameters() == ()


def test_every_part_that_is_shown_is_in_the_mode_of_its_adapters() -> None:
    ours, theirs = pair("dora", ("default", "other"))
    for mode in (True, False):
        for model in (ours, theirs):
            model.train(mode)
        assert {module.training for module in ours.modules()} == {mode}
        assert {module.training for module in theirs.modules()} == {mode}
    layer = ours.base_model.model.first
    layer.lora_dropout["default"].train()
    assert [layer.lora_A[name].training for name in ("default", "other")] == [True, False]
    layer.lora_A.eval()
    assert layer.adapter("default").training, "what shows a factor switches no dropout"


def test_notes_on_the_frozen_layer_are_not_the_layers() -> None:
    """accelerate and diffusers ask each module for what they noted on it, and take it off."""
    ours, _ = pair("copies")
    layer, copied = ours.base_model.model.first, ours.base_model.model.second
    for wrapper, frozen in ((layer, layer.base_layer), (copied, copied.modules_to_save["default"])):
        add_hook_to_module(frozen, ModelHook())
        frozen._note, frozen.remark = 1, 2
        assert hasattr(frozen, "_hf_hook") and not hasattr(wrapper, "_hf_hook") and not hasattr(wrapper, "_note")
        assert wrapper.remark == 2
        with pytest.raises(AttributeError, match="has no attribute '_note'"):
            _ = wrapper._note
    expected = ours(IDS)
    for wrapper in (layer, copied):
        add_hook_to_module(wrapper, ModelHook(), append=True)
    assert torch.equal(ours(IDS), expected)
    remove_hook_from_module(ours, recurse=True)
    assert torch.equal(ours(IDS), expected)
    assert not any(hasattr(module, "_hf_hook") for module in ours.modules())


def test_a_scaling_that_is_kept_aside_can_be_put_back() -> None:
    def states(model: Any) -> list[Any]:
        layer, found = model.base_model.model.first, []
        kept = layer.scaling
        layer.scaling = {name: value * 3 for name, value in kept.items()}
        found += [dict(kept), dict(layer.scaling), len(kept)]
        layer.scaling = kept
        found.append(dict(layer.scaling))
        kept["default"] = 7.0
        found.append(layer.scaling["default"])
        layer.scaling["default"] = 5.0
        copied = layer.scaling.copy()
        found += [kept["default"], layer.scaling is kept, isinstance(layer.scaling, dict)]
        layer.scaling["default"] = 1.0
        return [*found, copied]

    ours, theirs = pair("linear")
    assert states(ours) == states(theirs)
    layer = weakref.ref(ours.base_model.model.first)
    del ours
    gc.collect()
    assert layer() is None


def test_buffers_of_adapters_are_listed_by_pefts_names() -> None:
    def made(library: Any) -> Any:
        torch.manual_seed(0)
        base = Net().eval()
        model = library.get_peft_model(base, library.DeloraConfig(r=2, target_modules=["first"]))
        model.add_adapter("other", library.DeloraConfig(r=2, target_modules=["first"]))
        return model.eval()

    ours, theirs = made(nbpeft), made(peft)
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(IDS), theirs(IDS))
    layer = ours.base_model.model.first
    norms = layer.get_submodule("delora_w_norm")
    assert len(norms) == 2 and norms["default"] is layer.adapter("default")._buffers["delora_w_norm"]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(IDS), ours(IDS))
        assert twin.state_dict().keys() == ours.state_dict().keys()
    ours.to(torch.float64)
    assert {value.dtype for value in norms.values()} == {torch.float64} == {ours(IDS).dtype}
    norms["default"] = torch.zeros_like(norms["default"])
    assert not layer.adapter("default")._buffers["delora_w_norm"].any()
    ours.delete_adapter("other")
    assert list(norms) == ["default"] and not any("other" in name for name in ours.state_dict())


NAMED: dict[str, dict[str, Any]] = {
    **{"ShiraConfig": {"r": 2}, "FrodConfig": {}, "OSFConfig": {}, "UniLoraConfig": {}, "AdamssConfig": {}},
    **{"SupertuningConfig": {"sparsity": 0.5}, "TinyLoraConfig": {"r": 2, "u": 4}},
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.filterwarnings("ignore")
def test_every_path_of_a_module_leads_to_it(name: str) -> None:
    model = get_peft_model(Net(), getattr(nbpeft, name)(target_modules=["first"], **NAMED[name]))
    assert all(model.get_submodule(path) is module for path, module in model.named_modules())


@pytest.mark.parametrize("library", [nbpeft, peft])
def test_token_indices_are_a_list(library: Any) -> None:
    beside = library.LoraConfig(target_modules=["first"], trainable_token_indices={"table": [1, 3]})
    alone = library.TrainableTokensConfig(target_modules=["table"], token_indices=[1, 3])
    assert library.get_peft_model(Net(), beside).table.token_adapter.token_indices["default"] == [1, 3]
    assert library.get_peft_model(Net(), alone).table.token_indices["default"] == [1, 3]


UNFILLED: dict[str, dict[str, Any]] = {
    "DeftConfig": {"para": True},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "OFTConfig": {"oft_block_size": 3},
    "HiraConfig": {"r": 4},
}


@pytest.mark.parametrize("name", UNFILLED)
def test_a_layer_has_all_names_of_its_method(name: str) -> None:
    found: list[Any] = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(Net(), getattr(library, name)(target_modules=["first"], **UNFILLED[name]))
        found.append(model.base_model.model.first)
    ours, theirs = found
    names = {one for one in theirs.adapter_layer_names if not hasattr(getattr(theirs, one), "default")}
    assert names and all(list(getattr(ours, one)) == [] for one in names)
    assert not hasattr(ours, "lora_A")


def test_modules_in_a_list_have_the_mode_of_their_adapter() -> None:
    model = get_peft_model(Net(), nbpeft.PeanutConfig(target_modules=["first"]))
    layer: Any = model.base_model.model.first
    listed = next(module for module in layer.modules() if type(module) is ModuleListing)
    for mode in (False, True):
        model.train(mode)
        assert listed.training is mode
