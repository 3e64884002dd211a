"""``manager.use``: everything is as it was afterwards; and what activate and scale refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import AdapterError

INPUTS = torch.linspace(-1, 1, 12).view(3, 4)


def adapted(*names: str) -> AdapterManager:
    torch.manual_seed(0)
    manager = AdapterManager.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    for name in names:
        manager.add(name, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    return manager


def output(manager: AdapterManager) -> Tensor:
    with torch.no_grad():
        result: Tensor = manager.model(INPUTS)
    return result


def test_what_was_merged_is_merged_again_bit_for_bit() -> None:
    manager = adapted("a", "b")
    manager.merge()
    merged = output(manager)
    with pytest.warns(UserWarning, match="unmerging"), manager.use("b"):
        assert not manager.merged
        assert not torch.equal(output(manager), merged)
    assert (manager.merged, manager.active) == (("a",), ("a",))
    assert torch.equal(output(manager), merged)
    manager.unmerge()


def test_it_ends_well_where_the_adapters_of_before_were_renamed_or_deleted_meanwhile() -> None:
    manager = adapted("a", "b", "c")
    manager.activate(["a", "c"])
    manager.disable()
    with manager.use("b"):
        manager.rename("a", "z")
        assert manager.enabled
    assert (manager.active, manager.enabled) == (("z", "c"), False)
    with manager.use("b"):
        manager.remove("c")
    assert (manager.active, manager.enabled) == (("z",), False)


def test_none_are_active_again_where_none_were() -> None:
    manager = adapted()
    base = output(manager)
    manager.add("a", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), select=False)
    with manager.use("a"):
        assert not torch.equal(output(manager), base)
    assert manager.active == ()
    assert torch.equal(output(manager), base)
    assert not any(parameter.requires_grad for parameter in manager.parameters("a"))


@pytest.mark.parametrize("names", [None, 3, [["a"]]])
def test_what_is_no_name_is_refused_in_one_line(names: Any) -> None:
    manager = adapted("a")
    for command in (manager.activate, *((manager.merge,) if names is not None else ())):
        with pytest.raises(AdapterError, match="expected the name of an adapter or a list of names, not"):
            command(names)
    assert (manager.active, manager.merged) == (("a",), ())


@pytest.mark.parametrize("scale", [math.nan, math.inf, "much", None, [1.0]])
def test_a_scale_that_is_no_finite_number_is_refused(scale: Any) -> None:
    manager = adapted("a")
    before = output(manager)
    with pytest.raises(AdapterError, match="the scale of adapter 'a' must be a finite number"):
        manager.set_scale("a", scale)
    assert torch.equal(output(manager), before)
