"""SHiRA's places against peft's: drawn, of a function of one's own, read from a file; and calls of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def first_rows(layer: nn.Linear, r: int, **kwargs: Any) -> Tensor:
    mask = torch.zeros(layer.out_features, layer.in_features)
    mask.view(-1)[: r * sum(mask.shape)] = 1
    return mask


def places_of(model: PeftModel) -> dict[str, Tensor]:
    return {
        f"{path}.shira_indices": layer.adapter("default").saved_tensors(dict)["shira_indices"]
        for path, layer in model.manager.layers.items()
    }


@pytest.mark.parametrize("seed", [None, 5])
def test_drawn_places_are_those_of_peft(seed: int | None) -> None:
    ours: Any = get_peft_model(llama(), nbpeft.ShiraConfig(**FIELDS, random_seed=seed))
    found = places_of(ours)
    theirs = peft.get_peft_model(llama(), peft.ShiraConfig(**FIELDS, random_seed=seed)).base_model.model
    assert len(found) == 4
    for key, places in found.items():
        path = key.rpartition(".")[0]
        assert torch.equal(places, theirs.get_submodule(path).shira_indices["default"])
        assert ours.get_submodule(f"base_model.model.{path}").shira_indices["default"] is places


def test_places_of_a_function_of_ones_own_are_saved(tmp_path: Path) -> None:
    config = nbpeft.ShiraConfig(**FIELDS, mask_type="rows", init_weights=False)
    with pytest.raises(ConfigError, match="mask_type='rows' has no function here"):
        get_peft_model(llama(), config)
    config.mask_fn = first_rows
    model = get_peft_model(llama(), config).eval()
    assert all(int(places[0].max()) <= 8 for places in places_of(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    config.mask_fn = lambda layer, r: torch.ones(2, 2)
    with pytest.raises(ConfigError, match="must give a mask of shape"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize("place", [-1, 32])
def test_places_outside_of_the_weight_are_refused(place: int, tmp_path: Path) -> None:
    get_peft_model(llama(), nbpeft.ShiraConfig(**FIELDS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(places for name, places in tensors.items() if name.endswith("q_proj.shira_indices"))[0, 0] = place
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="places outside of its weight"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_hooks_on_the_base_layer_run() -> None:
    model = get_peft_model(llama(), nbpeft.ShiraConfig(**FIELDS)).eval()
    randomize(model, scale=0.1)
    alone = logits(model)
    calls = []
    layer: Any = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda *given: calls.append(given))
    assert_close(logits(model), alone)
    assert len(calls) == 1
