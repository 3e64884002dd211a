"""Super-Tuning's places and starts against peft's, files without places, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nbpeft
from nbpeft.errors import ConfigError, NbpeftError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close, differ
from tests.tiny_models import llama, logits, randomize

FIELDS: dict[str, Any] = {"sparsity": 0.95, "target_modules": ["q_proj", "down_proj"]}
INDICES, VALUES = "supertuning_indices", "supertuning_values"


@pytest.mark.parametrize("top", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("start", [True, False], ids=["identity", "random"])
def test_new_adapters_are_those_of_peft(top: bool, start: bool) -> None:
    made: list[Any] = []
    for module in (nbpeft, peft):
        config = module.SupertuningConfig(**FIELDS, select_top=top, r=2, init_weights=start)
        base = llama()
        torch.manual_seed(3)
        made.append(module.get_peft_model(base, config))
    ours, theirs = (module.get_peft_model_state_dict(model) for module, model in zip((nbpeft, peft), made, strict=True))
    assert ours.keys() == theirs.keys() and len(ours) == 16
    for key, value in theirs.items():
        assert_close(ours[key], value)
    layers = [model.base_model.model.model.layers[0].self_attn.q_proj for model in made]
    assert [one.supertuning_rank["default"] for one in layers] == [2, 2]
    assert [one.supertuning_lora_alpha["default"] for one in layers] == [4, 4]
    assert torch.equal(*(one.supertuning_indices["default"] for one in layers))
    assert layers[0].supertuning_lora_A["default"].weight.shape == (2, 32)
    weight = layers[0].base_layer.weight.detach().abs().flatten()
    trained = weight[layers[0].supertuning_indices["default"].long()]
    assert len(trained) == 51 and (
        trained.min() >= weight.quantile(0.94) if top else trained.max() <= weight.quantile(0.06)
    )


def test_a_file_without_places_finds_them_again(tmp_path: Path) -> None:
    model = get_peft_model(llama(), nbpeft.SupertuningConfig(**FIELDS, save_precomputed_indices=False)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    assert not any(INDICES in key for key in (*load_file(tmp_path / "adapter_model.safetensors"), *model.state_dict()))
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    other = get_peft_model(llama(), nbpeft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    other.merge_adapter()
    with pytest.raises(NbpeftError, match="initialized from"):
        other.load_adapter(str(tmp_path), "second")


def test_an_adapter_of_each_kind_side_by_side() -> None:
    """PEFT lets no two of one model differ in whether their places are saved."""
    model = get_peft_model(llama(), nbpeft.SupertuningConfig(**FIELDS, r=2)).eval()
    model.add_adapter("small", nbpeft.SupertuningConfig(**FIELDS, select_top=False, save_precomputed_indices=False))
    for name in ("default", "small"):
        randomize(model, name)
    model.set_adapter(["default", "small"])
    both = logits(model)
    model.merge_adapter()
    assert_close(logits(model), both)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)


def test_factors_alone_have_dropout() -> None:
    model = get_peft_model(llama(), nbpeft.SupertuningConfig(**FIELDS, r=2, lora_dropout=0.5)).eval()
    randomize(model)
    still = logits(model)
    assert torch.equal(logits(model), still)
    assert differ(logits(model.train()), still)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(logits(model.train()), logits(model.eval()))


def test_hooks_on_the_base_layer_run() -> None:
    """PEFT warns that they do not."""
    model = get_peft_model(llama(), nbpeft.SupertuningConfig(**FIELDS, r=2)).eval()
    randomize(model)
    alone, calls = logits(model), []
    layer: Any = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda *given: calls.append(given))
    assert_close(logits(model), alone)
    assert len(calls) == 1


@pytest.mark.parametrize("place", [-1, 32 * 64])
def test_places_outside_of_the_weight_are_refused(place: int, tmp_path: Path) -> None:
    get_peft_model(llama(), nbpeft.SupertuningConfig(**FIELDS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(places for name, places in tensors.items() if name.endswith(INDICES))[0] = place
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="places outside of its weight"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and less than 1, not 1.0"),
        ({"sparsity": -0.1}, "sparsity must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"lora_alpha": 4.0}, "lora_alpha needs r"),
        ({"r": 0}, "r must be a positive whole number"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbpeft.SupertuningConfig(**fields)
    with pytest.raises(ValueError):
        peft.SupertuningConfig(**fields)


def test_a_weight_without_an_entry_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0: sparsity = 0.99 leaves no entry to train of a weight of 4 x 8"):
        get_peft_model(nn.Sequential(nn.Linear(8, 4)), nbpeft.SupertuningConfig(target_modules=["0"]))
