"""Which modules a layer shows, after changes of its adapters and without any."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of, methods
from nbpeft.engine.views import shown_modules
from nbpeft.engine.views.shown_modules import unfilled
from nbpeft.model import LoraConfig, PeftModel, get_peft_model


@pytest.mark.parametrize("name", ["lora_A", "lora_embedding_A", "scaling", "lora_dropout", "no_such_name"])
def test_settings_are_empty_only_on_a_layer_without_adapters(name: str) -> None:
    method = method_of(LoraConfig())
    alone, among = (unfilled(method, name, with_settings=value) for value in (True, False))
    assert (alone is None) == (name == "no_such_name")
    assert (among is None) == (name not in method.peft.parameters.split())


SAMPLES = {
    f"{method.label}-{name}": (method.config_class, fields)
    for method in methods()
    for name, fields in list(method.sample_configs.items())[:1]
    if not method.transforms_calls
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.target = nn.Linear(16, 16), nn.Linear(16, 16)


def config_of(sample: str, targets: tuple[str, ...] = ("target",)) -> AdapterConfig:
    kind, fields = SAMPLES[sample]
    own = {"target_modules": [*targets], "feedforward_modules": []}
    return kind(**{key: value for key, value in own.items() if key in kind.__dataclass_fields__} | dict(fields))


def listed(module: nn.Module) -> list[Any]:
    """What iterating over a layer yields: parameters in order, which optimizers rely on, all else by name."""
    modules = {name: (type(part), [*part._modules], [*part._parameters]) for name, part in module.named_modules()}
    del modules[""]
    parameters = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    return [modules, parameters, {name: id(buffer) for name, buffer in module.named_buffers()}, {*module.state_dict()}]


def leaves(layer: nn.Module) -> dict[int, nn.Module]:
    """``id`` of a parameter -> the module that shows it alone."""
    modules = (part for part in layer.modules() if not isinstance(part, nn.ModuleDict | nn.ParameterDict))
    return {id(tensor): part for part in modules for tensor in part._parameters.values()}


def made_anew(layer: Any) -> list[Any]:
    """The same of a layer whose modules are all made anew, as after unpickling."""
    twin = copy.copy(layer)
    twin.__dict__.update(_modules={"base_layer": layer.base_layer}, _shown={})
    return listed(twin)


def changes(model: PeftModel, draw: random.Random, config: Callable[[], AdapterConfig]) -> None:
    """One random command on the adapters of a model."""
    manager, number = model.manager, draw.randrange(10**6)
    names = list(manager.names)
    chosen = draw.choice(names)
    if len(names) < 2 or draw.random() < 0.5:
        manager.add(f"n{number}", config(), select=False)
    elif draw.random() < 0.6:
        manager.remove(chosen)
    elif draw.random() < 0.5:
        manager.rename(chosen, f"n{number}")
    else:
        manager.place(chosen, draw.randrange(len(names)))


@pytest.mark.drawn(25)
@pytest.mark.parametrize("other", ["LoRA", "the same", "any"])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_show_is_what_is_shown_when_made_anew(sample: str, other: str) -> None:
    draw = random.Random(f"{sample} {other}")
    lora = next(name for name in SAMPLES if name.startswith("LoRA-"))

    def config() -> AdapterConfig:
        second = {"LoRA": lora, "the same": sample, "any": draw.choice([*SAMPLES])}[other]
        return config_of(draw.choice([sample, second]), draw.choice([("target",), ("first", "target")]))

    torch.manual_seed(0)
    model = get_peft_model(Net(), config_of(sample, ("first", "target")), adapter_name="start")
    layers = [model.base_model.model.target, model.base_model.model.first]
    for _ in range(12):
        shown = leaves(layers[0])
        changes(model, draw, config)
        for layer in layers:
            if hasattr(layer, "adapters"):
                assert listed(layer) == made_anew(layer)
        now = leaves(layers[0])
        assert all(now[key] is shown[key] for key in now.keys() & shown.keys())


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_a_change_visits_no_other_adapter(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[Any] = []
    parts_of: Any = shown_modules._parts_of
    monkeypatch.setattr(
        shown_modules, "_parts_of", lambda one, *rest, **more: visited.append(one) or parts_of(one, *rest, **more)
    )
    model = get_peft_model(Net(), config_of(sample, ("first", "target")), adapter_name="0")
    layer, manager = model.base_model.model.target, model.manager
    for number in range(1, 8):
        manager.add(f"{number}", config_of(sample, ("first", "target")))
    dict(layer.named_modules())
    visited.clear()
    manager.add("new", config_of(sample, ("first", "target")))
    dict(layer.named_modules())
    assert visited == [layer.adapters["new"]]
    manager.activate("3")
    manager.remove("5")
    manager.remove("0")
    dict(layer.named_modules())
    assert visited == [layer.adapters["new"]]
