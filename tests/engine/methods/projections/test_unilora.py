"""Uni-LoRA's draws against peft's, and files with indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize

FIELDS: dict[str, Any] = {"r": 3, "theta_d_length": 50, "target_modules": ["q_proj", "v_proj", "down_proj"]}
NAMES = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


@pytest.mark.parametrize("length", [1, 7, 256, 10_000])
def test_start_and_draws_are_those_of_peft(length: int) -> None:
    fields = {**FIELDS, "theta_d_length": length, "proj_seed": 3}
    torch.manual_seed(1)
    ours: Any = get_peft_model(llama(), nbpeft.UniLoraConfig(**fields))
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(llama(), peft.UniLoraConfig(**fields))
    for path in ours.manager.layers:
        found, expected = (model.get_submodule(f"base_model.model.{path}") for model in (ours, theirs))
        for name in NAMES:
            assert_close(getattr(found, name)["default"], getattr(expected, name)["default"])
    assert_close(logits(ours), logits(theirs))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.manager.shared("default").drawn is None  # as large as all factors


def test_two_adapters_keep_their_own_draws(tmp_path: Path) -> None:
    model: Any = get_peft_model(llama(), nbpeft.UniLoraConfig(**FIELDS))
    model.add_adapter("other", nbpeft.UniLoraConfig(**{**FIELDS, "target_modules": ["v_proj"]}, unilora_dropout=0.5))
    randomize(model, scale=1.0)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = logits(model.eval())
        model.save_pretrained(tmp_path, selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        assert_close(logits(PeftModel.from_pretrained(llama(), folder)), expected)
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
        assert_close(logits(theirs), expected)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"base_model.unilora_theta_d"}


def test_indices_of_a_file_are_taken_and_checked(tmp_path: Path) -> None:
    get_peft_model(llama(), nbpeft.UniLoraConfig(**FIELDS, save_indices=True)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}  # the file below them is overwritten
    key = next(name for name in tensors if name.endswith("indices_A"))
    tensors[key] = tensors[key].flip(0)
    save_file(tensors, file)
    again: Any = PeftModel.from_pretrained(llama(), tmp_path)
    layer = again.get_submodule(key.rpartition(".")[0])
    assert torch.equal(layer.unilora_indices_A["default"], tensors[key])
    tensors[key][0, 0] = 50
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="not those of 50 numbers"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("fields", [{"theta_d_length": 0}, {"init_theta_d_bound": 0.0}, {"unilora_dropout": 2.0}])
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        nbpeft.UniLoraConfig(**fields)
