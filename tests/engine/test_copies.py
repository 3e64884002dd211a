"""A copied or pickled model has the adapters of the original in the same state and order."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nbpeft import LoraConfig, PeftModel, get_peft_model
from tests.closeness import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:adapters are merged")

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def adapted() -> PeftModel:
    """A model with ``a``, which is active, ``b`` and ``c``; ``c`` is on one layer only, and all train a copy."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for name, targets in {"a": ["0", "1"], "b": ["0", "1"], "c": ["1"]}.items():
        copies = ["2"] if name == "b" else None
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=copies, init_lora_weights=False)
        if name == "a":
            model = get_peft_model(base, config, adapter_name="a")
        else:
            model.add_adapter(name, config)
    return model


def _order(model: PeftModel) -> None:
    model.manager.activate(["c", "a"])
    model.manager.set_scale("c", 0.5)
    model.manager.freeze("a")
    model.manager.rename("b", "z")
    model.manager.place("c", 0)


def _merge(model: PeftModel) -> None:
    model.manager.activate(["b", "c"])
    model.manager.merge(["c", "a"])


def _merge_one_layer(model: PeftModel) -> None:
    model.manager.layers["1"].merge(adapter_names=["c", "a"])


def _no_gradient_for_one_tensor(model: PeftModel) -> None:
    model.manager.parameters("a")[0].requires_grad_(False)


STATES: dict[str, Callable[[PeftModel], Any]] = {
    "as added": lambda model: None,
    "order, scale and frozen": _order,
    "merged": _merge,
    "merged in turn": lambda model: [model.manager.merge([name]) for name in "cba" if name != "b"],
    "one layer merged": _merge_one_layer,
    "disabled": lambda model: model.manager.disable(),
    "one layer switched": lambda model: model.manager.layers["1"].set_adapter(["c", "b"]),
    "one copy switched": lambda model: model.manager.copies["2"].set_adapter("b"),
    "a gradient switched off by hand": _no_gradient_for_one_tensor,
    "trained": lambda model: model.manager.unsaved.update("ca"),
}


def state(model: PeftModel) -> dict[str, Any]:
    """Everything that says which adapters there are, and which of them act."""
    manager = model.manager
    names = ("names", "selected", "active", "enabled", "merged", "_partly_merged", "frozen", "unsaved", "_scales")
    wrappers = [*manager.layers.values(), *manager.copies.values()]
    return {
        **{name: getattr(manager, name) for name in names},
        "configs": list(model.peft_config),
        "live": manager.active_state.live,
        "layers": [(list(one._named()), one.chosen_names(), one.adapters_enabled) for one in wrappers],
        "merged on layers": [layer.merged_names for layer in manager.layers.values()],
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "output": model(X).tolist(),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", STATES)
def test_a_copy_has_the_state_of_the_original(way: str, change: str) -> None:
    model = adapted()
    STATES[change](model)
    twin = WAYS[way](model)
    assert state(twin) == state(model)
    assert state(WAYS[way](twin)) == state(model)
    for one in (model, twin):
        one.manager.enable()
        one.set_adapter("a")
    assert state(twin) == state(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", ["use", "disable"])
def test_a_copy_made_in_a_block_is_that_of_the_model_outside_of_it(way: str, block: str) -> None:
    model = adapted()
    _merge(model)
    outside = model(X)
    with model.use("b") if block == "use" else model.disable_adapter():
        twin = WAYS[way](model)
    assert_close(twin(X), outside)
    with twin.use("b"):
        pass
    assert state(twin) == state(model)
