"""An embedding and a head that share one weight stay right when only one of them is merged into."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import nbpeft
from nbpeft.errors import MergeError
from tests.closeness import assert_close
from tests.tiny_models import adapted, config, llama, logits, randomize, same_state, state

ONE_END = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("targets", ONE_END)
def test_merging_parts_the_weight_and_unmerging_joins_it(targets: list[str]) -> None:
    """PEFT adds the delta to the weight both use, which changes what the model says."""
    model = adapted(llama(tie_word_embeddings=True), target_modules=targets)
    before, expected = state(model), logits(model)
    shared = model.get_base_model().get_input_embeddings().weight
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert same_state(state(model), before)
    assert model.get_base_model().get_input_embeddings().weight is shared
    assert model.get_base_model().get_output_embeddings().weight is shared


@pytest.mark.parametrize("targets", ONE_END)
def test_a_merged_model_is_saved_as_two_weights(targets: list[str], tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), target_modules=targets)
    expected = logits(model)
    with pytest.warns(UserWarning, match="no longer share a weight: set config.tie_word_embeddings=False"):
        bare: Any = model.merge_and_unload()
    assert_close(logits(bare), expected)
    bare.save_pretrained(tmp_path)
    again = type(bare).from_pretrained(tmp_path).eval()
    assert_close(logits(again), expected)


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
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert same_state(state(model), before)


def bert() -> Any:
    """A model whose output head has the weight of its embedding and a bias of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=97, **sizes)).eval()


def one_weight(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_an_adapter_of_biases_leaves_the_weight_shared() -> None:
    model = nbpeft.get_peft_model(bert(), nbpeft.BeftConfig(target_modules=["decoder"])).eval()
    randomize(model)
    before, expected = state(model), logits(model)
    model.merge_adapter()
    assert one_weight(model.get_base_model())
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert same_state(state(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare: Any = model.merge_and_unload()
    assert_close(logits(bare), expected)
    assert one_weight(bare) and bare.config.tie_word_embeddings


@pytest.mark.parametrize("names", [["head", "pair"], ["pair", "head"]])
def test_an_adapter_of_biases_beside_one_of_the_weight_parts_nothing(names: list[str]) -> None:
    settings: dict[str, Any] = {"target_modules": ["word_embeddings"], "ensure_weight_tying": True}
    made = {"head": nbpeft.BeftConfig(target_modules=["decoder"]), "pair": config(**settings)}
    model: Any = nbpeft.get_peft_model(bert(), made[names[0]], names[0], mixed=True).eval()
    model.add_adapter(names[1], made[names[1]])
    for name in names:
        randomize(model, name)
    model.set_adapter(names)
    before, expected = state(model), logits(model)
    model.manager.merge(names)
    assert one_weight(model.base_model.model)
    assert_close(logits(model), expected)
    model.manager.unmerge()
    assert same_state(state(model), before)


MERGED_WHOLE: dict[str, Any] = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_layer_does_not_change_a_merged_weight_of_several(end: str) -> None:
    model = adapted(llama(tie_word_embeddings=True), **MERGED_WHOLE)
    model.add_adapter("other", config(target_modules=["lm_head", "embed_tokens"]))
    before, expected = state(model), logits(model)
    model.merge_adapter()
    merged, layer = logits(model), getattr(model, f"get_{end}_embeddings")()
    for command in (layer.unmerge, lambda: layer.merge(adapter_names=["other"])):
        with pytest.raises(
            MergeError, match=r"(embed_tokens|lm_head) shares its merged weight with .*: unmerge the model"
        ):
            command()
        assert model.manager.merged == ("default",) and torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert same_state(state(model), before) and torch.equal(logits(model), expected)


@pytest.mark.parametrize("order", [("input", "output"), ("output", "input")])
@pytest.mark.parametrize("fields", [MERGED_WHOLE, {"target_modules": ["embed_tokens", "lm_head"]}])
def test_layers_merged_one_by_one_come_back_in_any_order(order: tuple[str, ...], fields: dict[str, Any]) -> None:
    model = adapted(llama(tie_word_embeddings=True), **fields)
    before, expected = state(model), logits(model)
    layers = [getattr(model, f"get_{end}_embeddings")() for end in order]
    for command in (*(layer.merge for layer in layers), *(layer.unmerge for layer in layers)):
        command()
        assert_close(logits(model), expected)
    assert same_state(state(model), before) and one_weight(model.get_base_model())
