"""Losses in chunks against those of the models of transformers, whole."""

from __future__ import annotations

import random

import pytest
import torch

from nbpeft.losses import chunked_head, without_logits
from nbpeft.model import LoraConfig, get_peft_model
from tests.losses.models import MODELS, batch_of, loss_and_gradients, model_of, takes


@pytest.mark.filterwarnings("ignore:.*reaches linear layers only")
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_whole_logits(name):
    model = model_of(name)
    draw = random.Random(name)
    compare(model, draw)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=draw.random() < 0.5)
    compare(get_peft_model(model, config), draw)


def compare(model, draw, tolerance=1e-6):
    for chunk_size in (1, 5, 64):
        batch = batch_of(draw)
        if takes(model, "num_items_in_batch") and draw.random() < 0.5:
            batch["num_items_in_batch"] = torch.tensor(draw.randint(1, 50))
        whole, gradients = loss_and_gradients(model, lambda: model(**batch).loss)
        with chunked_head(model, chunk_size) as head, without_logits(model):
            loss, chunked = loss_and_gradients(model, lambda: model(**batch).loss)
        assert head.chunked
        assert not head.needed_by
        assert loss.dtype == whole.dtype
        torch.testing.assert_close(loss, whole, rtol=tolerance, atol=tolerance, equal_nan=True)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        assert chunked.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(chunked[key], gradient, rtol=1e-5, atol=2 * tolerance * max(largest, 1))
