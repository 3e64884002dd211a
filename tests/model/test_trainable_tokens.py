"""Trained rows of embeddings beside LoRA, against peft: tied and untied heads, files both ways, merging."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import AdapterError, ConfigError, HotSwapError, LayerKindError, MergeError, TargetError
from nbpeft.model import (
    AdapterPool,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    merge_to_folder,
)
from tests.closeness import assert_close, differ
from tests.tiny_models import VOCABULARY, adapted, config, llama, logits, same_state, state, tokens

IDS = [5, 3, VOCABULARY - 1]
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": IDS}
    return {**base, "init_lora_weights": False, **changes}


def batch() -> Tensor:
    ids = tokens()
    ids[:, :3] = torch.tensor(IDS)
    return ids


def rows(**changes: Any) -> Any:
    """A model with rows away from the base's."""
    tied = changes.pop("tied", False)
    model = get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(**settings(**changes))).eval()
    move(model)
    return model


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "indices",
    [
        IDS,
        {"embed_tokens": IDS},
        {"model.embed_tokens": [7], "lm_head": [7]},
        {"embed_tokens": [5, 7], "lm_head": [3, 5]},
        {"lm_head": [5, 7, 3], "embed_tokens": [5, 7]},
        {"lm_head": [5]},
    ],
)
def test_files_go_both_ways_with_equal_outputs(tmp_path: Path, tied: bool, indices: Any) -> None:
    theirs: Any = peft.get_peft_model(
        llama(tie_word_embeddings=tied), peft.LoraConfig(**settings(trainable_token_indices=indices))
    ).eval()
    move(theirs)
    expected = logits(theirs, batch())
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "theirs")
    assert_close(logits(ours, batch()), expected)
    in_peft = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert get_peft_model_state_dict(ours, save_embedding_layers=False).keys() == in_peft.keys()
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "ours").eval()
    assert_close(logits(again, batch()), expected)
    assert ours.get_nb_trainable_parameters()[1] == theirs.get_nb_trainable_parameters()[1]


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rows_train_and_they_train_as_in_peft(tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    changes = settings(trainable_token_indices={"embed_tokens": IDS}, init_lora_weights=True)
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**changes))
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**changes))
    assert_close(logits(ours.eval(), batch()), logits(base, batch()))
    found = []
    for model in (ours, theirs):
        wanted = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        optimizer = torch.optim.SGD(wanted, lr=0.5)
        for _ in range(3):
            model(input_ids=batch(), labels=batch()).loss.backward()
            optimizer.step()
            model.zero_grad()
        (parameter,) = wanted
        found.append(parameter.detach())
    assert_close(found[0], found[1])
    own = dict(base.named_parameters())
    for name, parameter in ours.get_base_model().named_parameters():
        key = name.replace(".base_layer", "")
        assert key not in own or (not parameter.requires_grad and torch.equal(parameter, own[key]))


@pytest.mark.parametrize("tied", [False, True])
def test_merging_is_exact_and_goes_back(tied: bool) -> None:
    model = rows(tied=tied)
    before, expected = state(model), logits(model, batch())
    model.merge_adapter()
    assert_close(logits(model, batch()), expected)
    model.unmerge_adapter()
    assert same_state(state(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), logits(llama(tie_word_embeddings=tied), batch()))
    wanted = dict(get_peft_model_state_dict(model))[ROWS].clone()
    bare: Any = model.merge_and_unload()
    assert_close(logits(bare, batch()), expected)
    assert torch.equal(bare.model.embed_tokens.weight[IDS], wanted)
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_tied_rows_merge_once_beside_others(scale: float) -> None:
    model = rows(tied=True)
    model.add_adapter("table", config(target_modules=["embed_tokens"]))
    model.add_adapter("more", LoraConfig(**settings(trainable_token_indices=[9, 11])))
    move(model)
    model.base_model.set_adapter(["default", "table", "more"])
    model.manager.set_scale("default", scale)
    before, expected = state(model), logits(model, batch())
    model.base_model.set_adapter(["more", "table", "default"])
    assert_close(logits(model, batch()), expected)
    model.base_model.set_adapter(["default", "more"])
    expected = logits(model, batch())
    model.merge_adapter()
    assert_close(logits(model, batch()), expected)
    model.unmerge_adapter()
    assert same_state(state(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_into_a_folder(tmp_path: Path, tied: bool) -> None:
    model = rows(tied=tied)
    expected = logits(model, batch())
    merge_to_folder(model, None, tmp_path / "live")
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    for folder in ("live", "files"):
        again = type(llama()).from_pretrained(tmp_path / folder).eval()
        assert_close(logits(again, batch()), expected)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied == again.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_rows_serve_their_part_of_a_mixed_batch(tied: bool) -> None:
    model = rows(tied=tied)
    model.add_adapter("plain", config())
    with torch.no_grad():
        mixed = model(input_ids=batch(), adapter_names=["default", "plain"]).logits
    assert_close(mixed[0], logits(model, batch())[0])
    model.set_adapter("plain")
    assert_close(mixed[1], logits(model, batch())[1])


@pytest.mark.parametrize("tied", [False, True])
def test_copies_have_rows_of_their_own(tied: bool) -> None:
    model = rows(tied=tied)
    expected = logits(model, batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, batch()), expected)
        with torch.no_grad():
            get_peft_model_state_dict(twin)[ROWS].zero_()
        assert differ(logits(twin, batch()), expected) and torch.equal(logits(model, batch()), expected)
    model.manager.copy("default", "twin")
    model.manager.rename("default", "old")
    model.set_adapter("twin")
    assert_close(logits(model, batch()), expected)
    model.delete_adapter("old")
    assert torch.equal(logits(model, batch()), expected)
    bare: Any = model.unload()
    assert torch.equal(logits(bare, batch()), logits(llama(tie_word_embeddings=tied), batch()))
    assert bare.state_dict().keys() == llama(tie_word_embeddings=tied).state_dict().keys()


IMPOSSIBLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"trainable_token_indices": [97]}, ConfigError, "has 97 rows and no row 97; call resize_token_embeddings"),
    ({"trainable_token_indices": [-1]}, ConfigError, "no row -1"),
    ({"trainable_token_indices": [3, 3]}, ConfigError, "names a token more than once"),
    ({"trainable_token_indices": ["a"]}, ConfigError, "must be a list of whole numbers"),
    ({"trainable_token_indices": {"embed_tokns": [1]}}, TargetError, "Did you mean 'embed_tokens'"),
    ({"trainable_token_indices": {"norm": [1]}}, TargetError, "only rows of embeddings and heads"),
    ({"target_modules": ["embed_tokens"]}, TargetError, "already adapted or trained as a whole"),
    ({"modules_to_save": ["embed_tokens"]}, TargetError, "already adapted or trained as a whole"),
]


@pytest.mark.parametrize(("changes", "error", "message"), IMPOSSIBLE)
def test_what_cannot_be_trained_changes_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    base = llama()
    before = state(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, LoraConfig(**settings(**changes)))
    assert same_state(state(base), before)


def test_other_tokens_for_tied_modules_cannot_be_ensured_to_be_tied() -> None:
    fields = settings(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True)
    with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices"):
        peft.get_peft_model(llama(tie_word_embeddings=True), peft.LoraConfig(**fields))
    message = "model.embed_tokens and lm_head share one weight and have other tokens: trainable_token_indices must name"
    with pytest.raises(ConfigError, match=message):
        get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**fields))


@pytest.mark.parametrize("named", [{"embed_tokens": [5, 7], "lm_head": [3, 5]}, {"lm_head": [5]}])
def test_rows_of_their_own_make_two_weights_of_a_tied_one(named: dict[str, list[int]], tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    with pytest.warns(
        UserWarning, match="share one weight .* they differ while it is active, and merging gives them separate"
    ):
        model = get_peft_model(base, LoraConfig(**settings(trainable_token_indices=named))).eval()
    move(model)
    before, expected = state(model), logits(model, batch())
    model.merge_adapter()
    assert_close(logits(model, batch()), expected)
    model.unmerge_adapter()
    assert same_state(state(model), before) and base.lm_head.weight is base.model.embed_tokens.weight
    merge_to_folder(model, None, tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    with pytest.warns(UserWarning, match="no longer share a weight"):
        merged = model.merge_and_unload()
    for bare in (merged, again):
        assert_close(logits(bare, batch()), expected)
        assert bare.lm_head.weight is not bare.model.embed_tokens.weight and not bare.config.tie_word_embeddings


def test_a_head_alone_trains_rows_of_its_own_as_in_peft(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"token_indices": [1, 5], "target_modules": ["lm_head"]}
    theirs: Any = peft.get_peft_model(llama(tie_word_embeddings=True), peft.TrainableTokensConfig(**fields)).eval()
    move(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    assert_close(logits(ours, batch()), logits(theirs, batch()))


def test_tied_rows_are_not_combined_with_others_of_the_same_tokens() -> None:
    model = rows(tied=True)
    for name, named in (("same", {"lm_head": IDS}), ("other", {"lm_head": [7]})):
        model.add_adapter(name, LoraConfig(**settings(trainable_token_indices=named)))
    move(model)
    with pytest.raises(AdapterError, match="share one weight and would have other rows for the same tokens"):
        model.add_weighted_adapter(["default", "same"], [1.0, 1.0], "sum", combination_type="exact")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="exact")
    named = {"model.embed_tokens": IDS, "lm_head": [*IDS, 7]}
    assert model.peft_config["sum"].trainable_token_indices == named
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, batch())
    model.set_adapter("sum")
    assert_close(logits(model, batch()), expected)


def test_a_tied_head_shows_the_rows_of_the_embedding_as_in_peft() -> None:
    for library in (nbpeft, peft):
        settings_of = library.LoraConfig(**settings(ensure_weight_tying=True))
        model: Any = library.get_peft_model(llama(tie_word_embeddings=True), settings_of)
        base = model.get_base_model()
        table, head = base.model.embed_tokens.token_adapter, base.lm_head.token_adapter
        assert head.trainable_tokens_delta is table.trainable_tokens_delta and head.token_indices["default"] == IDS
        assert not any("lm_head" in name and "delta" in name for name, _ in model.named_parameters())
        apart = library.get_peft_model(llama(), library.LoraConfig(**settings()))
        assert not hasattr(apart.get_base_model().lm_head, "token_adapter")


def test_rows_alone_are_ensured_to_stay_tied() -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying=True but the model does not have tied weights"):
        get_peft_model(llama(), LoraConfig(**settings(ensure_weight_tying=True)))
    fields = settings(ensure_weight_tying=True, target_modules=["lm_head"])
    with pytest.raises(LayerKindError, match="already adapted or trained as a whole"):
        get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**fields))


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_modules must be a name pattern or a list of names"):
        nbpeft.TrainableTokensConfig(token_indices=[1], target_modules=[{"embed_tokens": 1}])  # type: ignore[list-item]


def test_rows_alone_need_no_target() -> None:
    model = get_peft_model(llama(), LoraConfig(**settings(target_modules=[])))
    assert list(model.manager.layers) == ["model.embed_tokens"]
    assert model.get_nb_trainable_parameters()[0] == len(IDS) * 32


def test_what_has_no_factors_is_neither_swapped_nor_pooled(tmp_path: Path) -> None:
    model = rows()
    model.save_pretrained(tmp_path)
    before = state(model)
    with pytest.raises(HotSwapError, match="has trainable tokens"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(HotSwapError, match="the new adapter has trainable tokens"):
        hotswap_adapter(adapted(), tmp_path, "default")
    pooled = adapted()
    with pytest.raises(AdapterError, match="load it without a pool"):
        AdapterPool(pooled, 10, adapters={"rows": tmp_path}).set_adapter("rows")
    assert same_state(state(model), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["exact", "linear", "svd"])
def test_rows_are_combined_by_their_changes(kind: str, tied: bool, tmp_path: Path) -> None:
    model = rows(tied=tied)
    model.add_adapter("other", LoraConfig(**settings(trainable_token_indices={"embed_tokens": [3, 7]})))
    model.add_adapter("none", LoraConfig(**settings(trainable_token_indices=None)))
    move(model)
    model.manager.set_scale("other", 0.5)
    table = model.get_input_embeddings().weight
    expected = table.detach().clone()
    for name, weight in (("default", 0.25), ("other", 0.5 * -2.0)):
        delta = model.manager.layers["model.embed_tokens"].adapter(name)
        expected[delta.token_list] += weight * (delta.rows - delta.frozen_rows)
    model.add_weighted_adapter(["default", "other", "none"], [0.25, -2.0, 1.0], "sum", combination_type=kind)
    made = model.peft_config["sum"]
    assert made.trainable_token_indices == {"model.embed_tokens": [*IDS, 7]}
    model.set_adapter("sum")
    ours = logits(model, batch())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "sum")
    assert_close(logits(theirs, batch()), ours)
    merged = model.merge_and_unload()
    assert_close(merged.get_input_embeddings().weight, expected)
    assert_close(logits(merged, batch()), ours)


def test_rows_and_factors_of_one_embedding_make_no_adapter() -> None:
    model = rows()
    model.add_adapter("factors", LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="has trainable tokens in adapter 'default' and another update in 'factors'"):
        model.add_weighted_adapter(["default", "factors"], [1.0, 1.0], "sum", combination_type="linear")
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge before combining adapters with trainable tokens"):
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
