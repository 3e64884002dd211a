"""Configs of prompts, and the tensors of their files."""

from __future__ import annotations

import torch

from nbpeft import PromptTuningConfig
from nbpeft.engine.config.prompt_config import ENCODER_KEY, PROMPT_KEY


def test_a_config_without_an_encoder_leaves_the_tensors_of_a_file_as_they_are() -> None:
    config = PromptTuningConfig(num_virtual_tokens=2)
    tensors = {PROMPT_KEY: torch.zeros(2, 4), ENCODER_KEY: torch.zeros(1)}
    same, kept = config.reconciled(tensors)
    assert same is config and kept.keys() == tensors.keys()
