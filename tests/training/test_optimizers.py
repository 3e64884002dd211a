from __future__ import annotations

import peft
import peft.optimizers
import pytest
import torch

from nbpeft.errors import TrainingError
from nbpeft.training import create_loraplus_optimizer, train
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_groups_and_rates_are_those_of_peft(settings):
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 5e-6}
    model = trainable(llama(), **{"r": 8, **settings})
    ours = create_loraplus_optimizer(model, torch.optim.AdamW, betas=(0.8, 0.9), **options)
    theirs = peft.optimizers.create_loraplus_optimizer(
        peft.get_peft_model(llama(), peft.LoraConfig(**settings)), torch.optim.AdamW, betas=(0.8, 0.9), **options
    )
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert (one["lr"], one["weight_decay"], one["betas"]) == (other["lr"], other["weight_decay"], other["betas"])
        assert sorted(part.shape for part in one["params"]) == sorted(part.shape for part in other["params"])


def test_b_learns_faster():
    model = trainable()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=8)
    names = {id(part): name for name, part in model.named_parameters()}
    rates = {
        names[id(part)].split(".")[-3]: group["lr"] for group in optimizer.param_groups for part in group["params"]
    }
    assert rates == {"lora_A": 1e-3, "lora_B": 8e-3}


@pytest.mark.parametrize("name", ["lora_B_v2", "lora_embedding_mine", "bias"])
def test_the_name_of_the_adapter_does_not_matter(name):
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 8}
    usual, named = (
        create_loraplus_optimizer(trainable(name=name, lora_bias=True), torch.optim.SGD, **settings)
        for name in ("default", name)
    )
    for one, other in zip(usual.param_groups, named.param_groups, strict=True):
        assert [part.shape for part in one["params"]] == [part.shape for part in other["params"]]


def test_it_goes_into_a_training():
    model = trainable()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert train(model, token_rows(), optimizers=(optimizer, None), max_steps=3).message == ""
    unused = train(model, token_rows(), optimizers=(optimizer, None), max_steps=4, learning_rate=0.5)
    assert unused.message == "learning_rate is not used: the optimizer has its own"


def test_nothing_to_train():
    model = trainable()
    model.manager.freeze("default")
    with pytest.raises(TrainingError, match="Nothing is trainable"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
