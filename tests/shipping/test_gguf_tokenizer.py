"""Tokenizers in GGUF files: transformers reads the same tokens out of them, and llama.cpp their kinds and scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast

from nbpeft.errors import ConfigError
from nbpeft.shipping import ship
from tests.shipping.support import adapted, keys, sentencepiece_like, tokenizer


def test_the_tokenizer_in_the_file_reads_text_the_same(tmp_path: Path) -> None:
    made = tokenizer()
    ship(adapted(), engine="llama.cpp", merged=True, tokenizer=made, to=tmp_path / "served")
    known = keys(tmp_path / "served" / "model.gguf")
    assert known["tokenizer.ggml.model"] == "gpt2" and known["tokenizer.ggml.pre"] == "smollm"
    assert known["tokenizer.ggml.bos_token_id"] == 0 and known["tokenizer.ggml.eos_token_id"] == 1
    assert known["tokenizer.chat_template"] == made.chat_template
    assert len(known["tokenizer.ggml.tokens"]) == 300 and known["tokenizer.ggml.token_type"][:2] == [3, 3]
    assert not known["tokenizer.ggml.add_bos_token"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "served", gguf_file="model.gguf")
    text = "select the orders of Bogotá"
    assert loaded(text)["input_ids"] == made(text)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_like_tokenizer_gets_scores(prefix: bool, tmp_path: Path) -> None:
    made = sentencepiece_like(prefix)
    ship(adapted(), engine="llama.cpp", merged=True, tokenizer=made, to=tmp_path / "served")
    known = keys(tmp_path / "served" / "model.gguf")
    assert known["tokenizer.ggml.model"] == "llama" and known["tokenizer.ggml.add_space_prefix"] is prefix
    assert known["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6], "unknown, two control tokens, bytes"
    scores = dict(zip(known["tokenizer.ggml.tokens"], known["tokenizer.ggml.scores"], strict=True))
    assert scores["or"] == 0 and scores["or"] > scores["ord"] > scores["orders"] > scores["o"] == scores["<unk>"]
    assert known["tokenizer.ggml.add_bos_token"]
    if prefix:
        loaded = AutoTokenizer.from_pretrained(tmp_path / "served", gguf_file="model.gguf")
        for text in ("orders of ord", "or é"):
            assert loaded(text)["input_ids"][-3:] == made(text)["input_ids"][-3:]


def test_other_tokenizers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    strange = tokenizer()
    strange.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="this tokenizer's pre-tokenization is not supported"):
        ship(adapted(), engine="llama.cpp", merged=True, tokenizer=strange, to=tmp_path / "served")
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\na\n")
    pieces = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    with pytest.raises(
        ConfigError, match="only BPE tokenizers can be written to GGUF files; this one's model is WordPi"
    ):
        ship(adapted(), engine="llama.cpp", merged=True, tokenizer=pieces, to=tmp_path / "served")
    with pytest.raises(ConfigError, match="this one's model is object"):
        ship(adapted(), engine="llama.cpp", merged=True, tokenizer=object(), to=tmp_path / "served")
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.txt"]
