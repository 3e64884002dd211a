"""Which rows can be trained."""

from __future__ import annotations

from typing import Any

import pytest

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import get_peft_model
from tests.tiny_models import llama


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
