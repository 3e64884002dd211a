"""What adding an adapter will change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbpeft import LoraConfig
from nbpeft.engine.injection.plan import plan
from nbpeft.errors import ConfigError
from tests.tiny_models import llama


@pytest.mark.filterwarnings("ignore:.*missing")
def test_excluded_paths_and_missing_targets_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.device("meta"):
        found = plan(model, LoraConfig(target_modules=["0", "1", "missing"], exclude_modules=["1"]))
    assert (found.paths, found.excluded, found.missing) == (("0",), ("1",), ("missing",))


@pytest.mark.parametrize("copied", ["embed_tokens", "lm_head"])
def test_what_shares_the_weight_of_a_copy_is_a_copy_without_size(copied: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[copied], ensure_weight_tying=True)
    copies = plan(llama(tie_word_embeddings=True), config).copies
    assert {path: extent.count > 0 for path, extent in copies.items()} == {
        "model.embed_tokens": copied == "embed_tokens",
        "lm_head": copied == "lm_head",
    }


def test_a_custom_layer_cannot_share_its_tensors() -> None:
    config = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    config._register_custom_module({nn.Linear: type("Own", (nn.Module,), {})})
    with pytest.raises(ConfigError, match="share one weight, and lm_head has a custom layer; remove all of them"):
        plan(llama(tie_word_embeddings=True), config)
