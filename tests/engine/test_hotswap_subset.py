"""Swapping in an adapter that lacks layers of the slot: they take its rank too, and add nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterWeights
from nbpeft.engine.hotswap import prepare_for_hotswap, swap
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import HotSwapError
from nbpeft.model import PeftModel, hotswap_adapter
from tests.closeness import assert_close

X = torch.ones(1, 4)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(x))
        return output


def config(rank: int, *targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False, **options)


def slot(**options: Any) -> Any:
    model = Pair()
    manager = AdapterManager.attach(model)
    manager.add("default", config(3, "first", "second", **options))
    return PeftModel.over(model, manager)


@pytest.mark.parametrize("room", [None, 8])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_saved_afterwards_loads(tmp_path: Any, rank: int, room: int | None, dora: bool) -> None:
    model = slot(use_dora=dora)
    prepare_for_hotswap(model.manager, room)
    donor = Pair()
    new = config(rank, "first", use_dora=dora)
    AdapterManager.attach(donor).add("default", new)
    weights = AdapterManager.attach(donor).weights("default")
    swap(model.manager, "default", new, weights, grow=room is None)
    expected = donor(X)
    assert_close(model(X), expected)
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(Pair(), tmp_path)(X), expected)


def test_a_slot_without_room_for_the_rank_says_so() -> None:
    model = slot()
    new = config(5, "first", rank_pattern={"first": 2})
    weights = AdapterWeights({"first": {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}})
    with pytest.raises(HotSwapError, match="second: rank 5 does not fit a slot of rank 3"):
        swap(model.manager, "default", new, weights)


def test_magnitudes_are_not_taken_from_merged_weights() -> None:
    model = slot(use_dora=True)
    model.manager.add("other", config(2, "second"))
    model.manager.merge(["other"])
    new = config(3, "first", use_dora=True)
    weights = model.manager.weights("default")
    del weights.adapters["second"]
    with pytest.raises(HotSwapError, match="lacks second, where 'other' is merged: unmerge first"):
        swap(model.manager, "default", new, weights)


@pytest.mark.filterwarnings("error")
def test_a_swap_while_another_is_merged_does_not_speak_of_another_base(tmp_path: Any) -> None:
    model = slot()
    model.save_pretrained(tmp_path)
    model.manager.add("other", config(2, "second"))
    model.manager.merge(["other"])
    hotswap_adapter(model, tmp_path, "default")


def test_a_safe_merge_of_adapters_on_different_layers() -> None:
    model = slot()
    model.manager.add("other", config(2, "second"))
    model.manager.activate(["default", "other"])
    before = model(X)
    model.merge_adapter(safe_merge=True)
    assert_close(model(X), before)
