"""An adapter that is kept comes back as it was, whatever its method."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft import LoraConfig, get_peft_model
from nbpeft.engine.contract.registry import methods
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.snapshots import Keeper, has_weights, keeps_weights, restore, snapshot
from nbpeft.errors import MergeError
from tests.faults.commands import IDS, adapted, config, state_of, tiny
from tests.state_machine_model import live_tensors
from tests.tiny_models import llama

SAMPLES = [
    pytest.param(method, fields, id=f"{method.label}-{name}")
    for method in methods()
    for name, fields in method.sample_configs.items()
    if not method.transforms_calls and not method.kinds.only  # which have tests of their own
]
SHARED: dict[Any, Any] = {
    nbpeft.UniLoraConfig: {"theta_d_length": 20},
    nbpeft.VBLoRAConfig: {"num_vectors": 8, "vector_length": 4, "topk": 2},
}
NAMES = ("a", "b", "dora", "whole", "rows")


def changed(model: Any, name: str, seed: int = 5) -> None:
    """Other values in all trained tensors, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.manager.parameters(name):
            one.add_(0.1 * torch.randn(one.shape, generator=generator))


@pytest.mark.drawn(45)
@pytest.mark.parametrize(("method", "fields"), SAMPLES)
def test_every_method_comes_back_bit_by_bit(method: Any, fields: dict[str, Any]) -> None:
    place = ["first"] if method.shares.companion is None else ["embed"]
    fields = {"target_modules": place} | {key: place if value == ["target"] else value for key, value in fields.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(tiny("dense"), method.config_class(**fields), adapter_name="x")
        model.add_adapter("y", config())
        changed(model.eval(), "x")
        with torch.no_grad():
            before = model(IDS)
        kept = snapshot(model.manager, "x")
        model.manager.remove("x")
        with torch.no_grad():
            assert not torch.equal(model(IDS), before)
        restore(model.manager, kept)
        with torch.no_grad():
            assert torch.equal(model(IDS), before)
        assert model.manager.names == ("x", "y") and model.manager.active == ("x",)
        later, weight = Keeper(model.manager, "x"), weakref.ref(model.get_base_model().first.base.module.weight)
        del model
        gc.collect()
        assert weight() is None, "what keeps an adapter keeps its model"
        manager = AdapterManager(tiny("dense"))
        restore(manager, later())
        with torch.no_grad():
            assert torch.equal(manager.model(IDS), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gone", ["deleted", "replaced"])
def test_everything_about_it_comes_back(name: str, gone: str) -> None:
    stage = adapted("dense")
    manager = stage.model.manager
    stage.model.set_adapter(name)
    changed(stage.model, name)
    manager.set_scale(name, 0.5)
    manager.unsaved.add(name)
    if name == "b":
        manager.freeze(name)
        for layer in manager.layers.values():
            if name in layer.adapters:
                layer.adapter(name).rescale(3.0)
    before, config_before = state_of(stage), manager.configs[name]
    kept = snapshot(manager, name)
    if gone == "deleted":
        manager.remove(name)
    else:
        manager.add(name, config(7), replace=True)
        manager.activate("a" if name != "a" else "b")
    assert state_of(stage) != before
    restore(manager, kept)
    assert state_of(stage) == before
    assert manager.configs[name] is config_before and manager.unsaved == {name}


def test_a_choice_that_was_made_since_stays() -> None:
    manager = adapted("dense").model.manager
    kept = snapshot(manager, "b")
    manager.remove("b")
    manager.activate("dora")
    restore(manager, kept)
    assert manager.active == ("dora",)


def test_in_place_it_comes_back_into_the_same_tensors() -> None:
    from nbpeft import hotswap_adapter
    from tests.faults.commands import saved

    stage = adapted("dense")
    manager = stage.model.manager
    changed(stage.model, "b")
    before, kept = state_of(stage), snapshot(manager, "b")
    held = [id(one) for one in manager.parameters("b")]
    hotswap_adapter(stage.model, saved()["b2"], "b")
    assert state_of(stage) != before
    restore(manager, kept, in_place=True)
    assert state_of(stage) == before and [id(one) for one in manager.parameters("b")] == held


def test_what_is_kept_is_a_copy() -> None:
    model = adapted("dense").model
    kept = snapshot(model.manager, "a")
    assert has_weights(model.manager, "a", kept.weights) and not has_weights(model.manager, "b", kept.weights)
    changed(model, "a")
    assert not has_weights(model.manager, "a", kept.weights)
    restore(model.manager, kept)
    changed(model, "a")
    restore(model.manager, kept)
    assert has_weights(model.manager, "a", kept.weights), "it can come back again"
    assert kept.byte_count == sum(one.nbytes for one in model.manager.parameters("a"))


def test_merged_weights_refuse_it() -> None:
    manager = adapted("dense").model.manager
    kept = snapshot(manager, "b")
    manager.remove("b")
    manager.merge(["a"])
    with pytest.raises(MergeError, match="'a' merged: unmerge before 'b' is restored"):
        restore(manager, kept)
    assert "b" not in manager.names and manager.merged == ("a",)


def test_half_precision_stays_so() -> None:
    base = tiny("dense").to(torch.bfloat16)
    model: Any = get_peft_model(base, config(), adapter_name="x", autocast_adapter_dtype=False)
    model.add_adapter("y", config())
    assert {one.dtype for one in model.manager.parameters("x")} == {torch.bfloat16}
    for name in ("x", "y"):
        kept, before = snapshot(model.manager, name), [one.detach().clone() for one in model.manager.parameters(name)]
        model.manager.remove(name)
        restore(model.manager, kept)
        after = list(model.manager.parameters(name))
        assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "config_class", [nbpeft.UniLoraConfig, nbpeft.TinyLoraConfig, nbpeft.VBLoRAConfig, nbpeft.VeraConfig]
)
def test_copied_or_kept_what_layers_share_is_not_rounded(config_class: Any, half: bool) -> None:
    config = config_class(target_modules=["q_proj", "v_proj"], **SHARED.get(config_class, {}))
    base = llama(dtype=torch.bfloat16)
    model: Any = get_peft_model(base, config, adapter_name="x", autocast_adapter_dtype=not half)
    manager = model.manager
    changed(model, "x")
    before = [one.detach().clone() for one in manager.parameters("x")]
    assert {one.dtype for one in before} == {torch.bfloat16 if half else torch.float32}
    manager.copy("x", "twin")
    kept = snapshot(manager, "x")
    manager.remove("x")
    restore(manager, kept)
    for name in ("x", "twin"):
        for found, expected in zip(manager.parameters(name), before, strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_nothing_lives_on_without_what_was_kept() -> None:
    stage = adapted("dense")
    before = live_tensors()
    kept = snapshot(stage.model.manager, "a")
    restore(stage.model.manager, kept)
    assert live_tensors()[0] > before[0]
    del kept
    assert live_tensors() == before


FIRST = {"r": 2, "target_modules": ["first"]}


@pytest.mark.parametrize(
    ("fields", "stays"),
    [
        ({"lora_alpha": 32}, True),
        ({"lora_dropout": 0.3}, True),
        ({"use_rslora": True}, True),
        ({"target_modules": "fir.*"}, True),
        ({"rank_pattern": {"second": 5}}, True),
        ({"r": 4}, False),
        ({"r": 4, "rank_pattern": {"first": 2}}, True),
        ({"target_modules": ["second"]}, False),
        ({"target_modules": ["first", "second"]}, False),
        ({"init_lora_weights": "gaussian"}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"use_dora": True}, False),
        ({"modules_to_save": ["head"]}, False),
        ({"bias": "lora_only"}, False),
        ({"trainable_token_indices": {"embed": [1]}}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_weights_stay_where_they_mean_the_same(fields: dict[str, Any], stays: bool) -> None:
    model: Any = get_peft_model(tiny("dense"), LoraConfig(**FIRST), adapter_name="x")
    plan = model.manager.plan(LoraConfig(**{**FIRST, **fields}), "x")
    assert keeps_weights(model.manager, "x", plan) is stays


def test_weights_of_another_method_do_not_stay() -> None:
    from nbpeft import IA3Config

    model: Any = get_peft_model(tiny("dense"), LoraConfig(**FIRST), adapter_name="x")
    plan = model.manager.plan(IA3Config(target_modules=["first"], feedforward_modules=[]), "x")
    assert not keeps_weights(model.manager, "x", plan)


def test_a_part_of_the_base_that_is_trained_comes_back() -> None:
    """Biases and embeddings belong to the base; deleting the adapter gives it its own again."""
    stage = adapted("dense")
    head: nn.Module = stage.base.get_submodule("first")
    own = head.base_layer.bias.detach().clone()  # type: ignore[union-attr, operator]
    changed(stage.model, "whole")
    trained = head.base_layer.bias.detach().clone()  # type: ignore[union-attr, operator]
    kept = snapshot(stage.model.manager, "whole")
    stage.model.manager.remove("whole")
    assert torch.equal(head.base_layer.bias, own)  # type: ignore[union-attr, arg-type]
    restore(stage.model.manager, kept)
    assert torch.equal(head.base_layer.bias, trained)  # type: ignore[union-attr, arg-type]


@pytest.mark.filterwarnings("ignore")
def test_weights_that_started_in_the_base_do_not_stay() -> None:
    started = LoraConfig(**{**FIRST, "init_lora_weights": "pissa"})
    model: Any = get_peft_model(tiny("dense"), started, adapter_name="x")
    assert not keeps_weights(model.manager, "x", model.manager.plan(started.copy(), "x"))
