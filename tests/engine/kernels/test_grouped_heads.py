"""Keys and values that several query heads share are kept once, on a CPU."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from torch import nn
from transformers.integrations import sdpa_attention

from nbpeft.engine.kernels.grouped_heads import _SWITCH, grouped_heads
from nbpeft.memory.saved import SavedTensors
from tests.closeness import assert_close
from tests.tiny_models import llama, tokens


def test_outputs_are_the_same_bits_and_less_is_kept() -> None:
    model = llama().requires_grad_(False)
    ids = tokens(2, 12)
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    embedded = model.get_input_embeddings()(ids).requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        with SavedTensors(model) as saved:
            logits = model(inputs_embeds=embedded, attention_mask=seen).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0], saved.peak

    plain, gradient, kept = run()
    with grouped_heads(model):
        grouped, of_groups, less = run()
    assert torch.equal(grouped, plain)
    assert_close(of_groups, gradient)
    read = _SWITCH in inspect.getsource(sdpa_attention)
    assert less < kept if read else less == kept, "older versions of transformers do not read the variable"
    assert _SWITCH not in os.environ


def test_the_last_of_several_blocks_ends_it() -> None:
    model = nn.Linear(2, 2)
    first, second = grouped_heads(model), grouped_heads(model)
    with second:
        first.__enter__()
    assert os.environ[_SWITCH] == "1"
    first.__exit__(None, None, None)
    assert _SWITCH not in os.environ


def test_who_has_chosen_and_models_elsewhere_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with grouped_heads(nn.Linear(2, 2, device="meta")), grouped_heads(nn.Identity()):
        assert _SWITCH not in os.environ
    monkeypatch.setenv(_SWITCH, "0")
    with grouped_heads(nn.Linear(2, 2)):
        assert os.environ[_SWITCH] == "0"
