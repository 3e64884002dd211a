"""DEFT beside peft: where it starts, PaRa, which has no injection, and layers with few outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.errors import ConfigError, HotSwapError
from nbpeft.model import PeftModel, convert_to_lora, get_peft_model, hotswap_adapter
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits, randomize

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 3}
WAYS = ["relu", "qr"]
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@pytest.mark.parametrize(
    "fields",
    [
        *({}, {"alpha": 6}, {"init_weights": False, "init_scale": 2.0}),
        *({"para": True}, {"para": True, "init_weights": False}),
    ],
    ids=str,
)
def test_start_is_that_of_peft(way: str, fields: dict[str, Any]) -> None:
    fields = {**TARGETS, **fields, "decomposition_method": way}
    torch.manual_seed(1)
    ours = get_peft_model(llama(), nbpeft.DeftConfig(**fields)).eval()
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llama(), peft.DeftConfig(**fields)).eval()
    expected, found = peft.get_peft_model_state_dict(theirs), nbpeft.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(found[key].detach(), tensor)
    assert_close(logits(ours), logits(theirs))


@every_way
def test_para_goes_both_ways_and_merges(way: str, tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), nbpeft.DeftConfig(r=2, para=True, decomposition_method=way)).eval()
    randomize(model, scale=0.3)
    expected = logits(model)
    assert (expected - logits(gpt2())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours").eval()
    assert_close(logits(theirs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "theirs")
    assert_close(logits(again), expected)
    _, tensors = convert_to_lora(again, 2)
    assert len(tensors) == 4
    assert_close(logits(again.merge_and_unload()), expected)


@every_way
def test_directions_are_no_more_than_outputs(way: str) -> None:
    fields = {"target_modules": ["0"], "r": 5, "alpha": 6, "decomposition_method": way}
    ours: Any = get_peft_model(nn.Sequential(nn.Linear(4, 2)), nbpeft.DeftConfig(**fields))
    theirs: Any = peft.get_peft_model(nn.Sequential(nn.Linear(4, 2)), peft.DeftConfig(**fields))
    found, expected = (model.base_model.model[0] for model in (ours, theirs))
    assert found.deft_r["default"] == expected.deft_r["default"] == 2
    assert found.deft_scaling["default"] == expected.deft_scaling["default"] == 3.0


@every_way
def test_a_layer_that_the_next_adapter_lacks_is_left_as_it_is(way: str, tmp_path: Path) -> None:
    fields = {**TARGETS, "decomposition_method": way}
    part = get_peft_model(llama(), nbpeft.DeftConfig(**{**fields, "target_modules": ["q_proj"]})).eval()
    randomize(part, scale=0.3)
    part.save_pretrained(tmp_path)
    model = get_peft_model(llama(), nbpeft.DeftConfig(**fields)).eval()
    randomize(model, scale=0.3)
    hotswap_adapter(model, str(tmp_path), "default")
    assert_close(logits(model), logits(part))
    if way == "qr":
        model = get_peft_model(llama(), nbpeft.DeftConfig(**fields, para=True))
        model.save_pretrained(tmp_path / "para")
        with pytest.raises(HotSwapError, match="takes directions out of every layer"):
            hotswap_adapter(model, str(tmp_path / "para"), "default")


def test_an_unknown_decomposition_is_refused() -> None:
    with pytest.raises(ConfigError, match="decomposition_method must be one of 'relu', 'qr', not 'svd'"):
        nbpeft.DeftConfig(decomposition_method="svd")
