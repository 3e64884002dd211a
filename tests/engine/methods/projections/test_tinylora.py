"""TinyLoRA against peft's: where it starts, which layers share a vector, and projections drawn from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, logits_of_each, randomize

FIELDS: dict[str, Any] = {"r": 2, "u": 4, "target_modules": ["q_proj", "embed_tokens"]}
MORE: dict[str, Any] = {"r": 2, "u": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_start_and_groups_are_those_of_peft(tying: float) -> None:
    fields = {**MORE, "weight_tying": tying, "init_weights": "uniform"}
    torch.manual_seed(1)
    ours: Any = get_peft_model(llama(), nbpeft.TinyLoraConfig(**fields))
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(llama(), peft.TinyLoraConfig(**fields))
    expected = peft.get_peft_model_state_dict(theirs)
    found = nbpeft.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(found[key].detach(), tensor)
    assert_close(logits(ours), logits(theirs))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_an_embedding_and_a_linear_layer_train_one_vector() -> None:
    config = {**FIELDS, "weight_tying": 1.0, "tinylora_dropout": 0.2}
    model: Any = get_peft_model(llama(), nbpeft.TinyLoraConfig(**config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(one.shape) for one in trained] == [(4,)] and model.tinylora_v["default"]["0"] is trained[0]
    assert len(model.tinylora_v["default"]) == 1
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert layer.tinylora_v["default"]["0"] is trained[0] and layer.r["default"] == 2 and layer.u["default"] == 4


def test_projections_of_a_second_adapter_are_its_own(tmp_path: Path) -> None:
    config = nbpeft.TinyLoraConfig(**FIELDS, save_projection=False)
    model: Any = get_peft_model(llama(), nbpeft.TinyLoraConfig(**MORE, save_projection=False))
    model.add_adapter("second", config)
    randomize(model, scale=1.0)
    model.set_adapter("second")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "second")
    assert_close(logits(again), expected)
    layer = again.base_model.model.model.layers[1].self_attn.q_proj
    alone = peft.get_peft_model(llama(), peft.TinyLoraConfig(**FIELDS)).base_model.model.model.layers[1].self_attn
    assert torch.equal(layer.tinylora_P["default"], alone.q_proj.tinylora_P["default"])


def test_deleting_and_reloading_beside_another_keeps_both(tmp_path: Path) -> None:
    model: Any = get_peft_model(llama(), nbpeft.TinyLoraConfig(**FIELDS))
    model.add_adapter("other", nbpeft.TinyLoraConfig(**MORE, weight_tying=0.5))
    randomize(model, scale=1.0)
    expected = logits_of_each(model)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.load_adapter(str(tmp_path), "default")
    assert_close(logits_of_each(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.unload()


@pytest.mark.parametrize(
    "fields", [{"u": 0}, {"weight_tying": 1.5}, {"init_weights": "normal"}, {"projection_seed": -1}]
)
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        nbpeft.TinyLoraConfig(**fields)
