"""Which changes of weights can be merged into the files of a base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbpeft.errors import MergeError
from nbpeft.model.saving.merge_deltas import Deltas, check_tied
from tests.tiny_models import llama


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_weight_that_is_stored_once_for_two_uses_is_not_changed_for_one(name: str) -> None:
    deltas = Deltas(replaced={name: torch.zeros(1)})
    with pytest.raises(MergeError, match=f"the adapter changes {name}, which base stores once for several uses"):
        check_tied(deltas, llama(tie_word_embeddings=True), "base")
    check_tied(deltas, llama(tie_word_embeddings=False), "base")
    check_tied(Deltas(replaced={"model.norm.weight": torch.zeros(1)}), llama(tie_word_embeddings=True), "base")


def test_weights_of_a_model_without_a_config_are_not_taken_for_tied() -> None:
    check_tied(Deltas(replaced={"0.weight": torch.zeros(1)}), nn.Sequential(nn.Embedding(3, 2)), "base")
