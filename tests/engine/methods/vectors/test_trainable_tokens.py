"""Which rows can be trained, and what training them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, randomize


@pytest.mark.parametrize("indices", [[], [1.5], ["a"], [True], "12", [-1], [10**6]])
@pytest.mark.parametrize("own", [False, True])
def test_what_is_no_row_is_refused_with_its_field(indices: Any, own: bool) -> None:
    field = "token_indices" if own else "trainable_token_indices"
    with pytest.raises(ConfigError, match=field) as refused:
        fields = {"target_modules": ["embed_tokens"]}
        config = (
            nbpeft.TrainableTokensConfig(token_indices=indices, **fields)
            if own
            else nbpeft.LoraConfig(trainable_token_indices={"embed_tokens": indices})
        )
        get_peft_model(llama(), config)
    assert "\n" not in str(refused.value)


class Scaled(nn.Embedding):
    """As the embedding of Gemma 3."""

    embed_scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@torch.no_grad()
def test_trained_rows_replace_those_of_the_table_where_they_are_looked_up_and_merged() -> None:
    torch.manual_seed(0)
    base, ids = Scaled(7, 4), torch.tensor([[0, 2, 5, 6], [2, 2, 1, 5]])
    base.register_buffer("embed_scale", torch.tensor(3.5))
    config = nbpeft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(base), config)
    randomize(model, scale=1.0)
    layer = next(iter(model.manager.layers.values()))
    adapter, table = layer.adapter("default"), base.weight.clone()
    table[[5, 2]] = adapter.rows
    assert_close(model(ids), F.embedding(ids, table) * 3.5)
    change = (table - base.weight).T
    assert_close(adapter.delta_weight(base.weight.T.clone(), layer.base), change)
    for share in (1.0, 0.25):
        merged = base.weight.T.clone()
        adapter.add_to_(merged, layer.base, share)
        assert_close(merged, base.weight.T + change * share)
