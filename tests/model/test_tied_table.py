"""What becomes of two tied weights, row by row: what is adapted and said, and what is tied once it is merged and saved.

The rows are those of huggingface/peft#2864; huggingface/transformers#45127 is what happens where a merged model says
that its weights are tied and they are not.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import nbpeft
from tests.closeness import assert_close, is_close
from tests.tiny_models import llama, logits, randomize, same_state, state

EMBED, HEAD = "model.embed_tokens", "lm_head"


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        fields: of the config.
        adapted: what of the two is adapted.
        tied: whether they are one weight after merging.
        as_peft: whether PEFT's merged model computes the same; where it does not, ours computes what its forward did.
    """

    fields: dict[str, Any]
    adapted: set[str]
    tied: bool
    as_peft: bool = True


ENSURED = {"ensure_weight_tying": True}
TABLE = {
    "elsewhere": Row({}, set(), True),
    "embed": Row({"target_modules": ["embed_tokens"]}, {EMBED}, False, as_peft=False),
    "head": Row({"target_modules": ["lm_head"]}, {HEAD}, False, as_peft=False),
    "both": Row({"target_modules": ["embed_tokens", "lm_head"]}, {EMBED, HEAD}, False, as_peft=False),
    "copy of embed": Row({"modules_to_save": ["embed_tokens"]}, {EMBED}, False),
    "copy of head": Row({"modules_to_save": ["lm_head"]}, {HEAD}, False),
    "copies of both": Row({"modules_to_save": ["embed_tokens", "lm_head"]}, {EMBED, HEAD}, False),
    "rows": Row({"trainable_token_indices": [1, 2]}, {EMBED, HEAD}, True),
    "ensured copy of embed": Row({"modules_to_save": ["embed_tokens"], **ENSURED}, {EMBED, HEAD}, True),
    "ensured copy of head": Row({"modules_to_save": ["lm_head"], **ENSURED}, {EMBED, HEAD}, True),
    "ensured copies": Row({"modules_to_save": ["embed_tokens", "lm_head"], **ENSURED}, {EMBED, HEAD}, True),
    "ensured embed": Row({"target_modules": ["embed_tokens"], **ENSURED}, {EMBED, HEAD}, True, as_peft=False),
    "ensured head": Row({"target_modules": ["lm_head"], **ENSURED}, {EMBED, HEAD}, True, as_peft=False),
    "ensured both": Row({"target_modules": ["embed_tokens", "lm_head"], **ENSURED}, {EMBED, HEAD}, True, as_peft=False),
    "ensured rows": Row({"trainable_token_indices": [1, 2], **ENSURED}, {EMBED, HEAD}, True),
}


def model() -> Any:
    return llama(tie_word_embeddings=True)


def config(library: Any, row: Row) -> Any:
    return library.LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, "r": 4, **row.fields})


def both_ends(found: Any) -> tuple[Tensor, Tensor]:
    return found.get_input_embeddings().weight, found.get_output_embeddings().weight


def adapted(row: Row) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = nbpeft.get_peft_model(model(), config(nbpeft, row)).eval()
    randomize(ours)
    return ours, [str(one.message) for one in caught if "share one weight" in str(one.message)]


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", TABLE)
def test_a_row_of_the_table_holds(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    ours, said = adapted(row)
    places = {*ours.manager.layers, *ours.manager.copies}
    assert places & {EMBED, HEAD} == row.adapted
    assert bool(said) != row.tied and all("merging gives them separate weights" in line for line in said)
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "adapter")
    loaded = nbpeft.PeftModel.from_pretrained(model(), str(tmp_path / "adapter")).eval()
    assert_close(logits(loaded), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = ours.merge_and_unload()
        first, second = both_ends(merged)
        assert (first is second) == row.tied == merged.config.tie_word_embeddings
        assert_close(logits(merged), expected)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    first, second = both_ends(again)
    assert (first.data_ptr() == second.data_ptr()) == row.tied
    assert_close(logits(again), expected)


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", TABLE)
def test_peft_reads_the_files_and_merges_what_it_can(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    ours, _ = adapted(row)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model(), str(tmp_path)).eval()
        assert_close(logits(theirs), logits(ours))
        theirs.save_pretrained(tmp_path / "theirs")
        back = nbpeft.PeftModel.from_pretrained(model(), str(tmp_path / "theirs")).eval()
        assert_close(logits(back), logits(ours))
        merged = logits(theirs.merge_and_unload())
    assert is_close(merged, logits(ours)) == row.as_peft


def test_an_ensured_copy_is_one_tensor_that_trains_once() -> None:
    row = TABLE["ensured copy of embed"]
    ours = nbpeft.get_peft_model(model(), config(nbpeft, row)).train()
    theirs = peft.get_peft_model(model(), config(peft, row))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert len({id(p) for p in ours.manager.parameters("default")}) == len(ours.manager.parameters("default"))
    copies = [wrapper.modules_to_save["default"].weight for wrapper in ours.manager.copies.values()]
    assert len(copies) == 2 and copies[0] is copies[1]
    before = copies[0].detach().clone()
    optimizer = torch.optim.SGD(ours.manager.parameters("default"), lr=0.1)
    ids = torch.arange(8)[None]
    ours(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(copies[0], before)
    plain = ours.unload()
    assert same_state(state(plain), state(model())) and both_ends(plain)[0] is both_ends(plain)[1]
