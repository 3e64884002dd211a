"""Losses in chunks against those of the models of transformers, whole."""

from __future__ import annotations

import random

import pytest
import torch

from nbpeft.model import LoraConfig, get_peft_model
from tests.losses.models import MODELS, batch_of, check_chunked, model_of, takes


@pytest.mark.drawn(8)
@pytest.mark.filterwarnings("ignore:.*adapts linear layers only")
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_whole_logits(name):
    model = model_of(name)
    draw = random.Random(name)
    compare(model, draw)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=draw.random() < 0.5)
    compare(get_peft_model(model, config), draw)


def compare(model, draw):
    for chunk_size in (1, 5, 64):
        batch = batch_of(draw)
        if takes(model, "num_items_in_batch") and draw.random() < 0.5:
            batch["num_items_in_batch"] = torch.tensor(draw.randint(1, 50))
        check_chunked(model, batch, chunk_size)
