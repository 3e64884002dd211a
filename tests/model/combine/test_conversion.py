"""Adapters that started in a part of the base, elsewhere than on the layer they adapt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import nbpeft.model as nbpeft
from nbpeft.errors import AdapterError, CheckpointNotFoundError, HotSwapError, MergeError
from nbpeft.model.saving.merge_export import merge_to_folder
from tests.closeness import assert_close, is_close
from tests.model.test_oracle import settings
from tests.tiny_models import llama, logits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def trained(base: nn.Module, **changes: Any) -> Any:
    """An adapter that started in the base and has moved on."""
    torch.manual_seed(4)
    model = nbpeft.get_peft_model(base, nbpeft.LoraConfig(**settings(init_lora_weights="pissa", **changes)))
    move(model)
    return model.eval()


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}], ids=str)
def test_saved_as_plain_lora_it_adds_the_same_anywhere(changes: dict[str, Any], tmp_path: Path) -> None:
    model = trained(llama(), **changes)
    expected = logits(model)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "never read")
    config = nbpeft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.init_lora_weights is True and config.r == 8
    assert_close(logits(nbpeft.PeftModel.from_pretrained(llama(), tmp_path)), expected)
    assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), expected)
    assert torch.equal(logits(model), expected)


def test_peft_converts_to_the_same_file(tmp_path: Path) -> None:
    torch.manual_seed(4)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(init_lora_weights="pissa")))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    ours = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**settings(init_lora_weights="pissa")))
    move(theirs)
    nbpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "start")
    given, own = (peft.load_peft_weights(str(tmp_path / name), device="cpu") for name in ("theirs", "ours"))
    assert given.keys() == own.keys()
    assert all(is_close(given[key], own[key]) for key in given)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_what_cannot_be_converted_is_told(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="DoRA"):
        trained(llama(), use_dora=True).save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion="x")
    patterned = trained(llama(), use_rslora=True, alpha_pattern={"v_proj": 2})
    with pytest.raises(AdapterError, match="use_rslora"):
        patterned.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion="x")
    assert not (tmp_path / "a").exists()
    plain = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**settings()))
    with pytest.raises(CheckpointNotFoundError, match="no folder x"):
        plain.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion="x")


def test_its_exact_combination_is_the_sum_of_the_deltas() -> None:
    model = trained(llama())
    model.add_adapter("plain", nbpeft.LoraConfig(**settings(r=2)))
    move(model)
    model.set_adapter(["default", "plain"])
    model.base_model.manager.set_scale("default", 0.7)
    expected = logits(model)
    model.base_model.manager.set_scale("default", 1.0)
    model.add_weighted_adapter(["default", "plain"], [0.7, 1.0], "both", combination_type="cat")
    assert model.peft_config["both"].init_lora_weights is True
    model.set_adapter("both")
    assert_close(logits(model), expected)


def test_it_serves_its_rows_of_a_mixed_batch() -> None:
    model = trained(llama())
    batch = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    alone = model(input_ids=batch).logits
    with model.disable_adapter():
        plain = model(input_ids=batch).logits
    mixed = model(input_ids=batch, adapter_names=["default", "__base__"]).logits
    assert_close(mixed[0], alone[0])
    assert_close(mixed[1], plain[1])


def test_a_copy_and_a_full_precision_folder_of_it(tmp_path: Path) -> None:
    model = trained(llama())
    expected = logits(model)
    model.base_model.manager.copy("default", "twin")
    model.set_adapter("twin")
    assert_close(logits(model), expected)
    merge_to_folder(model, "default", tmp_path / "merged")
    assert_close(logits(type(llama()).from_pretrained(tmp_path / "merged").eval()), expected)


def test_where_its_start_is_not_known_it_is_refused(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = trained(base)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(HotSwapError, match="initialized from a part of the base weights"):
        nbpeft.hotswap_adapter(model, tmp_path / "adapter", "default")
    other = nbpeft.get_peft_model(copy.deepcopy(llama()), nbpeft.LoraConfig(**settings()))
    other.save_pretrained(tmp_path / "plain")
    model.peft_config["default"].init_lora_weights = True
    with pytest.raises(HotSwapError, match="started in a part of the base"):
        nbpeft.hotswap_adapter(model, tmp_path / "plain", "default")
    with pytest.raises(MergeError, match="load it on that base model"):
        merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    pool = nbpeft.AdapterPool(other, 10)
    pool.register("started", tmp_path / "adapter")
    with pytest.raises(AdapterError, match="changes the base weights"):
        pool.load("started")
    assert torch.equal(logits(model), expected)
