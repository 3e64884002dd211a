"""PEANuT's networks against peft's: depths, activations, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits, randomize

FIELDS: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu_new"])
def test_outputs_and_parameters_are_those_of_peft(depth: int, activation: str, tmp_path: Path) -> None:
    fields = {**FIELDS, "depth": depth, "act_fn": activation, "scaling": 1.5, "init_weights": False}
    ours = get_peft_model(llama(), nbpeft.PeanutConfig(**fields)).eval()
    randomize(ours, scale=0.3)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    expected = logits(theirs)
    assert_close(logits(ours), expected)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    layer: Any = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.depth["default"] == depth and layer.act_fn["default"] == activation and layer.r["default"] == 3
    assert layer.res_num["default"] == depth
    assert layer.peanut_A["default"].weight.shape == (3, layer.out_features)
    assert len(layer.peanut_encoders["default"]) == depth
    trained = [[name for name, one in model.named_parameters() if one.requires_grad] for model in (ours, theirs)]
    assert trained[0] == trained[1]
    again = get_peft_model(llama(), nbpeft.PeanutConfig(**fields)).eval()
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(logits(again), logits(ours))
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 3.0


def test_a_transposed_layer_merges_as_it_computes() -> None:
    model = get_peft_model(gpt2(), nbpeft.PeanutConfig(r=4, depth=1, act_fn="silu")).eval()
    assert torch.equal(logits(model), logits(gpt2()))
    randomize(model, scale=0.3)
    before = logits(model)
    assert (before - logits(gpt2())).abs().max() > 1e-3
    assert_close(logits(model.merge_and_unload()), before)


def test_gradients_are_those_of_the_written_out_formula() -> None:
    layer = nn.Linear(6, 5)
    model: Any = get_peft_model(
        nn.Sequential(layer), nbpeft.PeanutConfig(r=2, depth=1, act_fn="tanh", target_modules=["0"], init_weights=False)
    )
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    held = dict(model.base_model.model[0].adapter("default").named_parameters())
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in held.items()}
    first = (layer.weight.detach().T @ copies["peanut_A"].T).tanh()
    second = (first @ copies["peanut_encoders.0"].T).tanh()
    rows = (second @ copies["peanut_decoders.0"].T).tanh() + first
    (layer(x) + x @ rows @ copies["peanut_B"].T).square().sum().backward()
    for name, tensor in held.items():
        assert_close(tensor.grad, copies[name].grad)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"act_fn": "rleu"}, "'relu'"),
        ({"act_fn": "prelu"}, "without parameters, as 'relu', not 'prelu'"),
        ({"act_fn": "xielu"}, "without parameters, as 'relu', not 'xielu'"),
        ({"depth": 65}, "64"),
        ({"r": 0}, "r must"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        nbpeft.PeanutConfig(**fields)
