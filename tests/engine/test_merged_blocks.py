"""Adapters that are merged, and what is done to them inside a block that needs the frozen weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.engine.hotswap import swap
from nbpeft.engine.runtime.snapshots import restore, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:merging into", "ignore:adapters are merged", "ignore:MatMul8bitLt")

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
CONFIG = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)


def _layer(kind: str) -> nn.Module:
    if kind == "dense":
        return nn.Linear(64, 64)
    modules = pytest.importorskip("bitsandbytes").nn
    built = (
        modules.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        if kind == "nf4"
        else modules.Linear8bitLt(64, 64, has_fp16_weights=False)
    )
    built.load_state_dict(nn.Linear(64, 64).state_dict())
    return built.to("cpu")  # type: ignore[no-any-return]


@pytest.fixture(params=["dense", "nf4", "int8"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(_layer(request.param), nn.Tanh(), _layer(request.param))


def adapted(base: nn.Module) -> PeftModel:
    """A model with ``a``, which is active, and ``b``."""
    model = get_peft_model(copy.deepcopy(base), CONFIG, adapter_name="a")
    model.add_adapter("b", CONFIG)
    return model


def _train(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in model.manager.parameters("a"):
            parameter.add_(0.2)


def _hot_swap(model: PeftModel) -> None:
    swap(model.manager, "a", CONFIG, model.manager.weights("b"))


def _replace_a_tensor(model: PeftModel) -> None:
    for layer in model.manager.layers.values():
        layer.lora_B["a"].weight = nn.Parameter(torch.full_like(layer.lora_B["a"].weight, 0.1))


def _rescale(model: PeftModel) -> None:
    for layer in model.manager.layers.values():
        layer.scaling["a"] = 3.0


def _write_the_base(model: PeftModel) -> None:
    layer = model.manager.layers["0"]
    layer.set_base_weight(layer.get_base_weight() * 2)


def _combine(model: PeftModel) -> None:
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="linear")


def _undo_a_deletion(model: PeftModel) -> None:
    kept = snapshot(model.manager, "a")
    _train(model)
    model.manager.remove("a")
    restore(model.manager, kept)


def _undo_a_change(model: PeftModel) -> None:
    kept = snapshot(model.manager, "a")
    model.manager.add("a", CONFIG.copy(r=4), replace=True)
    restore(model.manager, kept)
    _train(model)


def _in_an_inner_block(model: PeftModel) -> None:
    with model.disable_adapter(), model.use("a"):
        _train(model)


def _delete_and_add(model: PeftModel) -> None:
    model.delete_adapter("a")
    model.add_adapter("a", CONFIG)


COMMANDS: dict[str, tuple[Callable[[PeftModel], Any], tuple[str, ...]]] = {
    "nothing": (lambda model: None, ("a",)),
    "train": (_train, ("a",)),
    "hot-swap": (_hot_swap, ("a",)),
    "replace a tensor": (_replace_a_tensor, ("a",)),
    "scale": (lambda model: model.manager.set_scale("a", 0.5), ("a",)),
    "rescale": (_rescale, ("a",)),
    "reconfigure": (lambda model: model.manager.add("a", CONFIG.copy(r=4), replace=True), ("a",)),
    "rename": (lambda model: model.manager.rename("a", "z"), ("z",)),
    "delete": (lambda model: model.delete_adapter("a"), ()),
    "delete and add": (_delete_and_add, ()),
    "add": (lambda model: model.add_adapter("c", CONFIG), ("a",)),
    "combine": (_combine, ("a",)),
    "undo a change": (_undo_a_change, ("a",)),
    "undo a deletion": (_undo_a_deletion, ()),
    "unmerge": (lambda model: model.unmerge_adapter(), ()),
    "write the base": (_write_the_base, ("a",)),
    "train in an inner block": (_in_an_inner_block, ("a",)),
}


def weights(model: PeftModel) -> list[Tensor]:
    """The weights of the frozen layers as they are now, whatever they are stored in."""
    return [layer.get_base_weight().clone() for layer in model.manager.layers.values()]


def fresh(base: nn.Module, model: PeftModel) -> PeftModel:
    """A model made anew with the adapters of another one."""
    manager = model.manager
    twin: Any = None
    for name in manager.names:
        if twin is None:
            twin = get_peft_model(copy.deepcopy(base), manager.configs[name], adapter_name=name)
        else:
            twin.add_adapter(name, manager.configs[name])
        twin.manager.set_scale(name, manager.scale(name))
        for new, old in zip(twin.manager.parameters(name), manager.parameters(name), strict=True):
            new.data = old.detach().clone()
        for path, layer in manager.layers.items():
            twin.manager.layers[path].scaling[name] = layer.scaling[name]
    return twin  # type: ignore[no-any-return]


@pytest.mark.drawn(40)
@pytest.mark.parametrize("block", ["use", "disable"])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_what_is_merged_after_a_block_is_what_the_adapters_are_then(base: nn.Module, command: str, block: str) -> None:
    model = adapted(base)
    model.merge_adapter()
    run, left = COMMANDS[command]
    with model.use("b") if block == "use" else model.disable_adapter():
        run(model)
    assert model.manager.merged == left
    assert all(layer.merged_names == left for layer in model.manager.layers.values())
    if command == "write the base":
        changed = adapted(base)
        _write_the_base(changed)
        base = changed.unload()
    twin = fresh(base, model)
    frozen = weights(twin)
    if left:
        twin.merge_adapter(adapter_names=list(left))
    else:
        twin.set_adapter(model.active_adapter)
    assert all(torch.equal(one, other) for one, other in zip(weights(model), weights(twin), strict=True))
    with torch.no_grad():
        assert torch.equal(model(X), twin(X))
    if left:
        model.unmerge_adapter()
    assert all(torch.equal(one, other) for one, other in zip(weights(model), frozen, strict=True))


def test_merged_adapters_act_under_their_new_names_at_once(base: nn.Module) -> None:
    model = adapted(base)
    model.merge_adapter()
    with model.disable_adapter():
        model.manager.rename("a", "z")
        assert model.manager.active_state.live.names == ("z",)
        model.delete_adapter("z")
        assert model.manager.active_state.live.names == ("b",)


def test_a_layer_that_was_merged_alone_is_merged_alone_afterwards(base: nn.Module) -> None:
    model = adapted(base)
    first, second = model.manager.layers.values()
    first.merge(adapter_names=["a"])
    before = weights(model)
    with model.disable_adapter():
        model.manager.rename("a", "z")
    assert (first.merged_names, second.merged_names, model.manager.merged) == (("z",), (), ("z",))
    assert all(torch.equal(one, other) for one, other in zip(weights(model), before, strict=True))


def test_choosing_outside_of_a_block_ends_a_merge_as_it_does_without_one(base: nn.Module) -> None:
    def left(command: Callable[[PeftModel], Any]) -> tuple[str, ...]:
        model = adapted(base)
        model.merge_adapter()
        with model.use("b"):
            thread = threading.Thread(target=command, args=(model,))
            thread.start()
            thread.join(10)
        merged: tuple[str, ...] = model.manager.merged
        return merged

    assert left(lambda model: model.set_adapter("a")) == ("a",)
    assert left(lambda model: model.set_adapter("b")) == ()
    assert left(lambda model: model.manager.enable()) == ("a",)
    assert left(lambda model: model.manager.disable()) == ()
