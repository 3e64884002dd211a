"""Mixed batches where a layer sees one row for the whole batch: embeddings of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import gpt2, randomize

NAMES = ["a", "__base__", "b", "a"]


def with_positions(**fields: Any) -> PeftModel:
    """Two adapters on positions, with other values than the base's."""
    model = get_peft_model(gpt2(), LoraConfig(r=2, **fields), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=3, **fields))
    for seed, name in enumerate("ab"):
        randomize(model, name, seed)
    model.eval()
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["wpe", "wte"]},
        {"target_modules": ["wpe"], "use_dora": True},
        {"target_modules": ["c_fc"], "modules_to_save": ["wpe"]},
    ],
    ids=["lora", "dora", "copy"],
)
@torch.no_grad()
def test_each_row_has_its_own_positions(fields: dict[str, Any]) -> None:
    model = with_positions(fan_in_fan_out="modules_to_save" in fields, **fields)
    tokens = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(2))
    mixed = model(tokens, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        with model.disable_adapter() if name == "__base__" else model.use(name):
            alone = model(tokens[row : row + 1]).logits
        assert_close(mixed[row], alone[0])
    assert (mixed - gpt2()(tokens).logits)[[0, 2, 3]].abs().amax((1, 2)).min() > 1e-3
    beams = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert model.generate(input_ids=tokens, adapter_names=NAMES, **beams).shape[0] == 4
