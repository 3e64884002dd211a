"""Layers of somebody else's class: the same class, written for peft, in both libraries."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.injection.custom_layers import CustomLayer
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, LayerKindError, MergeError, NotSupportedError, UnknownAdapterError
from nbpeft.model import LoraConfig, LoraLayer, get_peft_model
from nbpeft.peft_layers.lora_layers import Linear
from tests.closeness import assert_close, differ


def lstm_class(library: Any) -> type[Any]:
    """A class as PEFT documents it, which writes its mappings by hand."""

    class LSTMWithLoRA(nn.Module, library.tuners.lora.LoraLayer):  # type: ignore[misc, name-defined]
        lora_A: Any
        lora_B: Any

        def __init__(self, base_layer: Any, adapter_name: str, config: Any, r: int = 8, **kwargs: Any) -> None:
            super().__init__()
            library.tuners.lora.LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, **kwargs)

        def update_layer(self, adapter_name: str, r: int, lora_alpha: float = 8, **kwargs: Any) -> None:
            self.r[adapter_name], self.scaling[adapter_name] = r, lora_alpha / r
            self.lora_A[adapter_name] = nn.Linear(self.base_layer.input_size, r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(r, self.base_layer.hidden_size, bias=False)
            self.set_adapter(self.active_adapters)

        def forward(self, x: Tensor) -> Any:
            output, state = self.base_layer(x)
            for name in [] if self.disable_adapters else self.active_adapters:
                if name in self.lora_A:
                    output = output + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
            return output, state

    return LSTMWithLoRA


def linear_class(library: Any) -> type[Any]:
    return type("OwnLinear", (library.tuners.lora.Linear,), {})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.lin = nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lin(self.lstm(x)[0]))  # type: ignore[no-any-return]


BATCH = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
TARGETS = ["lstm", "lin", "out"]


def config(library: Any, r: int = 3, **fields: Any) -> Any:
    found = library.LoraConfig(r=r, lora_alpha=6, target_modules=TARGETS, **fields)
    found._register_custom_module({nn.LSTM: lstm_class(library), nn.Linear: linear_class(library)})
    return found


def adapted(library: Any = nbpeft, *, names: tuple[str, ...] = ("default",), random: bool = True) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(Net(), config(library), names[0])
        for name in names[1:]:
            model.add_adapter(name, config(library, r=2))
    for name, parameter in model.named_parameters() if random else ():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(BATCH)  # type: ignore[no-any-return]


def test_the_same_class_computes_and_trains_as_in_peft() -> None:
    ours, theirs = adapted(random=False), adapted(peft, random=False)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), "drawn alike from one seed"
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(BATCH).square().mean().backward()
            optimizer.step()
    assert_close(output(ours), output(theirs))
    assert not torch.equal(output(ours), output(adapted(random=False)))


def test_the_class_is_what_hangs_in_the_model() -> None:
    model = adapted()
    lstm, lin = model.base_model.model.lstm, model.base_model.model.lin
    registered = model.peft_config["default"]._custom_modules
    assert isinstance(lstm, registered[nn.LSTM]) and isinstance(lin, registered[nn.Linear])
    assert not isinstance(lstm, registered[nn.Linear]) and isinstance(lstm, LoraLayer)
    assert isinstance(lstm.base_layer, nn.LSTM) and isinstance(lin, Linear) and not isinstance(lstm, Linear)
    assert [type(module).__name__ for _, module in lin.named_children()][:1] == ["Linear"]
    assert lstm.scaling == {"default": 2.0} and lstm.r == {"default": 3} and "lora.OwnLinear" in repr(model)
    plain = get_peft_model(Net(), LoraConfig(target_modules=["lin"]))
    assert not isinstance(plain.base_model.model.lin, linear_class(nbpeft))
    assert isinstance(plain.base_model.model.lin, Linear)


def test_several_adapters_switch_delete_and_rename() -> None:
    ours, theirs = adapted(names=("a", "b")), adapted(peft, names=("a", "b"))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model.set_adapter("b")
    assert_close(output(ours), output(theirs))
    lstm = ours.base_model.model.lstm
    assert [*lstm.lora_A] == ["a", "b"] and lstm.r == {"a": 3, "b": 2}
    assert lstm.lora_A["b"].weight.requires_grad and not lstm.lora_A["a"].weight.requires_grad
    only_b = output(ours)
    ours.base_model.manager.rename("b", "c")
    assert torch.equal(output(ours), only_b) and [*lstm.lora_A] == ["a", "c"] and lstm.r == {"a": 3, "c": 2}
    ours.delete_adapter("a")
    assert torch.equal(output(ours), only_b) and [*lstm.lora_A] == ["c"] == [*lstm.scaling]
    ours.delete_adapter("c")
    assert isinstance(ours.get_base_model().lstm, nn.LSTM) and isinstance(ours.get_base_model().lin, nn.Linear)


def test_blocks_without_adapters_are_the_base_model() -> None:
    model = adapted()
    torch.manual_seed(0)
    base, before = Net().eval(), output(model)
    with model.disable_adapter():
        assert_close(output(model), output(base))
    assert torch.equal(output(model), before) and differ(before, output(base))
    model.base_model.disable_adapter_layers()
    assert_close(output(model), output(base))


def test_what_is_saved_loads_here_and_in_peft(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    for library in (nbpeft, peft):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = library.PeftModel.from_pretrained(Net(), tmp_path, config=config(library)).eval()
        assert_close(output(loaded), output(model))


def test_a_class_that_merges_does_so_and_gives_the_frozen_weight_back() -> None:
    torch.manual_seed(0)
    own = LoraConfig(r=2, target_modules=["lin", "out"], lora_bias=True)
    own._register_custom_module({nn.Linear: linear_class(nbpeft)})
    model = get_peft_model(Net(), own).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    lin: Any = model.base_model.model.lin
    frozen, before = lin.base_layer.weight.clone(), output(model)
    model.merge_adapter(safe_merge=True)
    assert lin.merged and lin.merged_adapters == ["default"] and not torch.equal(lin.base_layer.weight, frozen)
    assert_close(output(model), before)
    with pytest.warns(UserWarning, match="merged: unmerging before"), model.disable_adapter():
        assert torch.equal(lin.base_layer.weight, frozen) and not lin.merged
    assert lin.merged
    model.unmerge_adapter()
    assert torch.equal(lin.base_layer.weight, frozen) and torch.equal(output(model), before)
    assert_close(lin.get_delta_weight("default"), lin.custom.get_delta_weight("default"))
    assert_close(model.merge_and_unload()(BATCH), before)


def test_one_that_cannot_merge_refuses_and_changes_nothing() -> None:
    model = adapted()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"lstm: a LSTMWithLoRA has no merge\(\)"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])
def test_copies_are_apart(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = type("Pickled", (Linear,), {"__module__": __name__})
    monkeypatch.setitem(globals(), "Pickled", own)
    settings = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    settings._register_custom_module({nn.Linear: own})
    model = get_peft_model(Net(), settings).eval()
    before, other = output(model), twin(model)
    nn.init.zeros_(other.base_model.model.lin.lora_B["default"].weight)
    assert torch.equal(output(model), before) and not torch.equal(output(other), before)
    assert isinstance(other.base_model.model.lin, own)


def test_one_that_fails_leaves_the_model_as_it_was() -> None:
    class Broken(Linear):
        def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(base_layer, *args, **kwargs)
            if base_layer.out_features == 2:
                raise RuntimeError("too small")

    settings, base = LoraConfig(target_modules=["lin", "out"]), Net()
    settings._register_custom_module({nn.Linear: Broken})
    with pytest.raises(RuntimeError, match="too small"):
        get_peft_model(base, settings)
    assert type(base.lin) is nn.Linear and manager_of(base) is None and base.lin.weight.requires_grad


def test_planning_draws_no_random_numbers_and_modes_reach_the_object() -> None:
    settings = LoraConfig(target_modules=["lin"], lora_dropout=0.5)
    settings._register_custom_module({nn.Linear: linear_class(nbpeft)})
    model: Any = get_peft_model(Net(), settings)
    state = torch.get_rng_state()
    plan = model.base_model.manager.plan(settings, "default")
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.targets[0].shapes == {"lora_A.weight": (8, 6), "lora_B.weight": (5, 8)}
    layer = model.base_model.model.lin
    assert isinstance(layer, CustomLayer) and layer.custom.training and layer.lora_dropout["default"].training
    model.eval()
    assert not layer.custom.training and not layer.lora_dropout["default"].training


def test_half_models_get_adapters_that_train() -> None:
    settings = LoraConfig(target_modules=["lin"])
    settings._register_custom_module({nn.Linear: linear_class(nbpeft)})
    model: Any = get_peft_model(Net().to(torch.bfloat16), settings)
    assert model.base_model.model.lin.lora_A["default"].weight.dtype == torch.float32
    assert model(BATCH.to(torch.bfloat16)).dtype == torch.bfloat16


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    model = adapted(names=("a", "b"))
    with pytest.raises(NotSupportedError, match="a LSTMWithLoRA does not support adapter_names"):
        model(BATCH, adapter_names=["a", "b", "__base__"])
    assert model(BATCH, adapter_names=["__base__"] * 3).shape == (3, 2, 2)
    model.base_model.manager.set_scale("a", 0.5)
    with pytest.raises(NotSupportedError, match="does not support scales: set the scale to 1"):
        model(BATCH)
    with pytest.raises(ConfigError, match="lin is a OwnLinear, which does not support IA3Config: exclude it"):
        model.add_adapter("c", nbpeft.IA3Config(target_modules=["lin"], feedforward_modules=[]))
    other = LoraConfig(target_modules=["lin"])
    other._register_custom_module({nn.Linear: lstm_class(nbpeft)})
    with pytest.raises(
        LayerKindError, match="lin already has adapters in a OwnLinear: it cannot become a LSTMWithLoRA"
    ):
        model.add_adapter("c", other)
    plain = get_peft_model(Net(), LoraConfig(target_modules=["lin"]))
    with pytest.raises(LayerKindError, match="lin already has adapters and cannot become a LSTMWithLoRA"):
        plain.add_adapter("c", other)


def test_an_update_of_a_layer_is_the_classes_own() -> None:
    model = adapted(names=("a", "b"))
    lin, before = model.base_model.model.lin, output(model)
    lin.update_layer("a", 5, 5, config=LoraConfig(init_lora_weights=False))
    assert lin.r == {"a": 5, "b": 2} and lin.lora_A["a"].weight.shape == (5, 6) and lin.scaling["a"] == 1.0
    assert not torch.equal(output(model), before) and lin.lora_A["a"].weight.requires_grad
    assert any(lin.lora_A["a"].weight is one for one in model.base_model.manager.parameters("a"))
    with pytest.raises(ConfigError, match="`r` should be a positive integer value"):
        lin.update_layer("a", 0, 5, config=LoraConfig())
    with pytest.raises(UnknownAdapterError, match="Adapter 'c' not found"):
        lin.update_layer("c", 2, 5, config=LoraConfig())
    assert lin.r == {"a": 5, "b": 2}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_scalings_that_are_written_act_and_go_with_a_copy() -> None:
    model = adapted()
    lin, before = model.base_model.model.lin, output(model)
    with nbpeft.rescale_adapter_scale(model, 0.5):
        assert lin.scaling == {"default": 1.0} and not torch.equal(output(model), before)
    assert torch.equal(output(model), before)
    lin.scaling["default"] = 0.25
    weaker = output(model)
    model.base_model.manager.copy("default", "twin")
    model.set_adapter("twin")
    assert lin.scaling == {"default": 0.25, "twin": 0.25} and torch.equal(output(model), weaker)
    lin.set_scale("twin", 1.0)
    assert torch.equal(output(model), before)


def test_a_config_without_the_class_joins_it() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lin"]))
    assert model.base_model.model.lin.r == {"default": 3, "second": 2}
    model.set_adapter("second")
    assert output(model).shape == (3, 2, 2)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_what_the_ready_class_does_not_compute_is_refused(fields: dict[str, Any]) -> None:
    settings = LoraConfig(target_modules=["lin"], **fields)
    settings._register_custom_module({nn.Linear: linear_class(nbpeft)})
    with pytest.raises(ConfigError, match=r"is not supported by custom layer classes \(OwnLinear\): leave it out"):
        get_peft_model(Net(), settings)


def test_layers_of_unknown_classes_are_warned_of_as_in_peft() -> None:
    torch.manual_seed(0)
    for library in (nbpeft, peft):
        settings = config(library)
        settings.target_modules = ["lstm"]
        with pytest.warns(UserWarning, match=r"Unsupported layer type '<class 'torch.nn.modules.rnn.LSTM'>'"):
            library.get_peft_model(Net(), settings)
