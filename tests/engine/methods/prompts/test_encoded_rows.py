"""Prompts of an encoder-decoder that is called with the encoder's output."""

from __future__ import annotations

import pytest
import torch

import nbpeft
from tests.closeness import assert_close
from tests.engine.methods.test_prompts import prompted, t5
from tests.tiny_models import randomize, tokens


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_rows_that_are_encoded_already_keep_their_own_prompts(masked: bool) -> None:
    """Prompts of several lengths pad the encoder's output, which a mask has to hide."""
    task = {"task_type": "SEQ_2_SEQ_LM"}
    model, ids = prompted("p4", t5(), **task), tokens()
    model.add_adapter("p2", nbpeft.PromptTuningConfig(num_virtual_tokens=2, **task))
    randomize(model, "p2", scale=0.5)
    call = {"decoder_input_ids": ids, "adapter_names": ["p4", "p2"]}
    call |= {"attention_mask": torch.ones_like(ids)} if masked else {}
    whole = model(input_ids=ids, **call)
    again = model(encoder_outputs=(whole.encoder_last_hidden_state,), **call)
    assert_close(again.logits, whole.logits)
