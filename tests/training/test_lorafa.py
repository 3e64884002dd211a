from __future__ import annotations

import warnings
from typing import Any

import peft
import peft.optimizers
import peft.optimizers.lorafa
import pytest
import torch
from torch import nn

from nbpeft.engine.methods.lora.optimizers import LoraFAOptimizer
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training import create_lorafa_optimizer, train
from tests.closeness import assert_close
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable

TOKENS = torch.tensor([row["input_ids"][:4] for row in token_rows(8)])


def backward(model):
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item()


def steps(model, optimizer, count):
    losses = []
    for _ in range(count):
        losses.append(backward(model))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_learns_as_with_peft(tmp_path, config):
    ours = trainable(lora_alpha=8, **config)
    ours.save_pretrained(str(tmp_path))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lr": 1e-2, "weight_decay": 0.1}
    expected = steps(theirs, peft.optimizers.create_lorafa_optimizer(theirs, **options), 6)
    found = steps(ours, create_lorafa_optimizer(ours, **options), 6)
    # PEFT projects the gradients in bfloat16.
    assert_close(found, expected)
    assert found[-1] < found[0] - 0.01


def test_a_is_frozen_and_the_projection_is_that_of_the_paper():
    model = trainable(lora_alpha=8)
    parameters = dict(model.named_parameters())
    before = {name: part.detach().clone() for name, part in parameters.items() if "lora_A" in name}
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    backward(model)
    for name, lora_B in parameters.items():
        if ".lora_B." in name:
            lora_A = parameters[name.replace(".lora_B", ".lora_A")].double()
            expected = lora_B.grad.double() @ torch.linalg.inv(lora_A @ lora_A.T) / 2.0**2
            assert_close(optimizer.projected(lora_B).double(), expected, dtype=torch.float32)
    steps(model, optimizer, 3)
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert not any(parameters[name].requires_grad for name in before)


def test_the_inverse_is_computed_once_and_again_when_a_changes(monkeypatch):
    model, calls = trainable(), []
    pinv = torch.linalg.pinv

    def counted(*args, **kwargs):
        calls.append(1)
        return pinv(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "pinv", counted)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    steps(model, optimizer, 4)
    assert len(calls) == 4, "two layers with two targets"
    with torch.no_grad():
        next(part for name, part in model.named_parameters() if "lora_A" in name).mul_(2)
    steps(model, optimizer, 2)
    assert len(calls) == 5


def test_a_dora_magnitude_is_trained_as_it_is():
    model = trainable(use_dora=True)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    losses = steps(model, optimizer, 6)
    assert losses[-1] < losses[0] - 0.01
    magnitudes = [part for name, part in model.named_parameters() if "magnitude_vector" in name]
    backward(model)
    assert magnitudes and all(torch.equal(optimizer.projected(part), part.grad) for part in magnitudes)


def test_it_goes_into_a_training_and_its_state_can_be_loaded():
    model = trainable()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    result = train(model, token_rows(), optimizers=(optimizer, None), max_steps=12)
    assert result.message == "" and result.state.history[-1][1] < result.state.history[0][1]
    again = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[again.param_groups[0]["params"][0]]["step"] == 12


def test_groups_name_their_parameters_as_in_peft():
    group = create_lorafa_optimizer(trainable(lora_alpha=8), r=4, lora_alpha=8, lr=1e-2).param_groups[0]
    named = dict(zip(group["names"], group["scaling_factors"], strict=True))
    assert named and all(scaling == 2.0 for scaling in named.values()) and len(named) == len(group["params"])


@pytest.mark.parametrize("given", [{"scaling_factors": [2.0, 2.0, None]}, {"scaling_factor": 2.0}])
def test_groups_that_are_put_together_by_hand_learn_as_with_peft(given):
    found = []
    for kind in (LoraFAOptimizer, peft.optimizers.lorafa.LoraFAOptimizer):
        torch.manual_seed(0)
        lora_A, lora_B, other = (nn.Parameter(torch.randn(size)) for size in ((2, 6), (5, 2), (3, 3)))
        names = ["lin.lora_A.default.weight", "lin.lora_B.default.weight", "head.weight"]
        lora_A.requires_grad_(False)
        groups: Any = [{"params": [lora_A, lora_B, other], "names": names, **given}]
        optimizer = kind(groups, lr=1e-2)
        lora_B.grad, other.grad = torch.randn(5, 2), torch.randn(3, 3)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        told = [one.category for one in warned if "`scaling_factor` is deprecated" in str(one.message)]
        assert told == ([FutureWarning] if "scaling_factor" in given else [])
        found.append(torch.cat([one.detach().flatten() for one in (lora_A, lora_B, other)]))
    assert_close(*found)
    assert not torch.equal(found[0][-9:], torch.zeros(9))


def test_impossible_requests():
    model = trainable(llama())
    with pytest.raises(ConfigError, match="the config of 'default' says otherwise: leave it out"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, use_rslora=True)
    with pytest.warns(FutureWarning, match="config says it"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, use_rslora=False)
    model.manager.freeze("default")
    with pytest.raises(TrainingError, match="No trainable lora_B"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    with pytest.raises(ConfigError, match="must not be negative"):
        create_lorafa_optimizer(trainable(), r=4, lora_alpha=8, lr=-1.0)
