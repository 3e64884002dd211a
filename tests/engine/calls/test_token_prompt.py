"""Prompts that are rows of an embedding, called as scripts call PEFT's prompt encoders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nbpeft import PromptTuningConfig
from nbpeft.engine.calls.token_prompt import TokenPrompt
from nbpeft.engine.contract.base import BaseLayer


class OtherTokens(TokenPrompt):
    def all_tokens(self, base: BaseLayer) -> Tensor:
        return -super().all_tokens(base)


class OtherInput(TokenPrompt):
    def input_tokens(self, base: BaseLayer) -> Tensor:
        return -super().input_tokens(base)


def test_rows_are_given_only_where_they_are_the_prompt() -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, token_dim=2, num_transformer_submodules=1)
    ids = torch.tensor([[0, 2]])
    prompt = TokenPrompt(config)
    assert torch.equal(prompt.tokens_at(ids), prompt.embedding.weight[ids])
    for other in (OtherTokens, OtherInput):
        with pytest.raises(NotImplementedError, match="is not called with ids"):
            other(config).tokens_at(ids)
