"""A command plans an adapter once and hands the plan on: the model is walked for the plan, and not to build it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import nbpeft
from nbpeft.engine.injection import plan as planning
from nbpeft.engine.tree import adapted_tree, model_tree
from nbpeft.session import Session
from nbpeft.session.commands import adapters
from tests.tiny_models import llama

FIELDS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
_READS = 2
"""Times that the tree of a bare model is read for adapters: before the first one is put on it, and after."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often anything is planned, walked, and read for adapters."""
    found: Counter[str] = Counter()
    walk = model_tree.walk

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return call

    for name, function in (("plans", planning.plan), ("walks", walk)):
        wrapped = counted(name, function)
        for module_name, module in list(sys.modules.items()):
            attribute = function.__name__
            if module_name.startswith("nbpeft.") and vars(module).get(attribute) is function:
                monkeypatch.setattr(module, attribute, wrapped)
    monkeypatch.setattr(adapted_tree, "walk", counted("reads", walk))
    return found


def test_an_adapter_on_a_bare_model_is_planned_and_walked_once(counts: Counter[str]) -> None:
    Session().add(llama(), FIELDS)
    assert counts == {"plans": 1, "walks": 1, "reads": _READS}


def test_further_adapters_and_configs_are_planned_and_walked_once(counts: Counter[str]) -> None:
    session = Session()
    added = session.add(llama(), FIELDS)
    counts.clear()
    session.add(added.model, FIELDS, name="other")
    assert counts == {"plans": 1, "walks": 1}
    counts.clear()
    session.add(added.model, {**FIELDS, "r": 8}, name="other")
    assert counts == {"plans": 1, "walks": 1}


def test_a_preview_is_planned_and_walked_once(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "plan_or_reason", lambda *_: None)  # forecasts plan for models of their own
    session = Session()
    added = session.add(llama(), FIELDS)
    counts.clear()
    session.preview(added.model, {**FIELDS, "r": 8})
    assert counts == {"plans": 1, "walks": 1}


def test_a_saved_adapter_is_planned_and_walked_once(counts: Counter[str], tmp_path: Path) -> None:
    nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**FIELDS)).save_pretrained(tmp_path)
    counts.clear()
    Session().load(str(tmp_path), model=llama())
    assert counts["plans"] == 1


def test_a_module_in_several_places_gets_one_wrapper_in_all_of_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.inner = nn.Sequential(self.first, nn.ReLU())
            self.copied = nn.Linear(2, 2)
            self.again = self.copied

        def forward(self, x: Any) -> Any:
            return self.again(self.inner(self.first(x)))

    config = nbpeft.LoraConfig(target_modules=["first"], modules_to_save=["copied"])
    assert planning.plan(Twice(), config).other_paths == {"first": ("inner.0",), "copied": ("again",)}
    model = nbpeft.get_peft_model(Twice(), config).base_model.model
    assert model.inner[0] is model.first and hasattr(model.first, "lora_A")
    assert model.again is model.copied and hasattr(model.copied, "modules_to_save")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_site_is_found_by_its_path(adapted: bool) -> None:
    model = llama()
    if adapted:
        nbpeft.get_peft_model(model, nbpeft.LoraConfig(modules_to_save=["mlp"], **FIELDS))
    assert all(model_tree.site_at(model, site.path) == site for site in model_tree.walk(model))
    with pytest.raises(KeyError):
        model_tree.site_at(model, "model.layers.0.nothing")
