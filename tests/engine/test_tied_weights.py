"""An embedding and a head that share one weight stay right when only one of them is merged into."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import adapted, config, llama, logits, same_state, state

ONE_END = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("targets", ONE_END)
def test_merging_parts_the_weight_and_unmerging_joins_it(targets: list[str]) -> None:
    """PEFT adds the delta to the weight both use, which changes what the model says."""
    model = adapted(llama(tie_word_embeddings=True), target_modules=targets)
    before, expected = state(model), logits(model)
    shared = model.get_base_model().get_input_embeddings().weight
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert same_state(state(model), before)
    assert model.get_base_model().get_input_embeddings().weight is shared
    assert model.get_base_model().get_output_embeddings().weight is shared


@pytest.mark.parametrize("targets", ONE_END)
def test_a_merged_model_is_saved_as_two_weights(targets: list[str], tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), target_modules=targets)
    expected = logits(model)
    with pytest.warns(UserWarning, match="two weights now: config.tie_word_embeddings is set to False"):
        bare: Any = model.merge_and_unload()
    torch.testing.assert_close(logits(bare), expected, atol=1e-5, rtol=1e-4)
    bare.save_pretrained(tmp_path)
    again = type(bare).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-4)


def test_adapters_elsewhere_leave_the_weight_shared() -> None:
    model = adapted(llama(tie_word_embeddings=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare: Any = model.merge_and_unload()
    assert bare.lm_head.weight is bare.model.embed_tokens.weight and bare.config.tie_word_embeddings


def test_a_second_adapter_is_merged_into_the_weight_of_its_own() -> None:
    model = adapted(llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    model.add_adapter("head", config(target_modules=["lm_head"]))
    before = state(model)
    model.base_model.set_adapter(["default", "head"])
    expected = logits(model)
    model.set_adapter("default")
    model.merge_adapter(["default"])
    model.merge_adapter(["head"])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert same_state(state(model), before)
