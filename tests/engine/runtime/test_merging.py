"""What cannot be added while adapters are merged."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from nbpeft import LoHaConfig
from nbpeft.errors import MergeError
from nbpeft.model import LoraConfig, get_peft_model
from tests.tiny_models import adapted, config, llama


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"bias": "all", "target_modules": ["1"]}, r"0\.bias"),
        ({"init_lora_weights": "pissa", "target_modules": ["0"]}, "0"),
        ({"use_dora": True, "target_modules": ["0"]}, "0"),
    ],
)
def test_an_adapter_that_starts_in_merged_weights_is_refused(fields: dict[str, Any], place: str) -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["1"]))
    model.merge_adapter(["default"])
    with pytest.raises(MergeError, match=rf"'default' merged: unmerge before .* initialized from {place}$"):
        model.add_adapter("new", LoraConfig(r=2, **fields))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["0", "1"]))
    assert "new" not in model.peft_config and "plain" in model.peft_config


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_ties_nothing_is_added_while_a_tied_weight_is_apart() -> None:
    model = adapted(llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    model.merge_adapter()
    model.manager.add("other", LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(MergeError, match="is not tied at the moment: unmerge before"):
        model.add_adapter("tied", config(target_modules=["q_proj"], ensure_weight_tying=True))
    assert model.manager.names == ("default", "other")
