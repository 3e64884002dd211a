"""The config of P-tuning on a model."""

from __future__ import annotations

from typing import Any

import peft
import pytest

import nbpeft
from tests.tiny_models import llama


@pytest.mark.parametrize("size", [None, 12])
def test_the_size_of_the_encoder_is_in_the_config_as_in_peft(size: int | None) -> None:
    fields: dict[str, Any] = {"num_virtual_tokens": 2, "encoder_hidden_size": size, "task_type": "CAUSAL_LM"}
    ours = nbpeft.get_peft_model(llama(), nbpeft.PromptEncoderConfig(**fields)).peft_config["default"]
    theirs = peft.get_peft_model(llama(), peft.PromptEncoderConfig(**fields)).peft_config["default"]
    assert ours.encoder_hidden_size == theirs.encoder_hidden_size == (size or 32)
