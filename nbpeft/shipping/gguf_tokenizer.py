"""Writes BPE tokenizers to GGUF files: tokens, token types, merges, and the name of the pre-tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbpeft.checkpoint import gguf_package
from nbpeft.errors import ConfigError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("bytes", "")
_SPLITS: Mapping[tuple[tuple[str, str], ...], str] = {
    (("bytes", "words"),): "gpt-2",
    (("digits", "single"), ("bytes", "words")): "smollm",
    (("split", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"), _BYTES): "llama-bpe",
    (("split", rf"{_WORDS}\p{{N}}{_REST}"), _BYTES): "qwen2",
}
"""Steps of a pre-tokenizer -> llama.cpp's name for it (``tokenizer.ggml.pre``)."""


def check_tokenizer(tokenizer: Any, vocabulary_size: int) -> None:
    """Checks that a tokenizer can be written with a model.

    Args:
        tokenizer: a tokenizer of transformers.
        vocabulary_size: number of rows of the model's embedding.

    Raises:
        ConfigError: it is not BPE, has ids beyond the embedding, or has a pre-tokenizer that is unknown here.
    """
    parts = _parts(tokenizer)
    if not parts["model"].get("byte_fallback"):
        _split_name(parts)
    last = max(tokenizer.get_vocab().values())
    if last >= vocabulary_size:
        raise ConfigError(f"the tokenizer has the id {last}, but the model's embedding has only {vocabulary_size} rows")


def describe_tokenizer(writer: Any, tokenizer: Any, vocabulary_size: int, folder: Path) -> None:
    """Adds the vocabulary and the chat template.

    Args:
        writer: a ``GGUFWriter``.
        tokenizer: a fast BPE tokenizer of transformers.
        vocabulary_size: number of rows of the embedding; ids without a token get a placeholder.
        folder: folder with the saved tokenizer and the model's config.

    Raises:
        ConfigError: see ``check_tokenizer``.
    """
    gguf = gguf_package()
    parts = _parts(tokenizer)
    model = parts["model"]
    byte_level = not model.get("byte_fallback")
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(_split_name(parts) if byte_level else "default")
    tokens, kinds = _tokens(tokenizer, vocabulary_size, byte_level)
    writer.add_token_list(tokens)
    if not byte_level:
        begin = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens
        writer.add_add_space_prefix(bool(begin) and begin[0].startswith("▁"))
        writer.add_token_scores(_scores(tokens, model["merges"]))
    writer.add_token_types([gguf.TokenType[kind] for kind in kinds])
    special = gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=len(tokens))
    special.add_special_token = {"bos": _adds(tokenizer, first=True)}
    if _adds(tokenizer, first=False):
        special.add_special_token["eos"] = True
    if tokenizer.chat_template and special.chat_template is None:
        special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Returns the content of a fast tokenizer's ``tokenizer.json``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = parts.get("model", {}).get("type", type(tokenizer).__name__)
    if kind != "BPE":
        raise ConfigError(f"only BPE tokenizers can be written to GGUF files; this one's model is {kind}")
    return parts


def _split_name(parts: Mapping[str, Any]) -> str:
    steps = parts["pre_tokenizer"] or {}
    found = tuple(_step(step) for step in steps.get("pretokenizers", [steps]))
    if found not in _SPLITS:
        known = ", ".join(_SPLITS.values())
        raise ConfigError(f"this tokenizer's pre-tokenization is not supported; supported: {known}")
    return _SPLITS[found]


def _step(step: Mapping[str, Any]) -> tuple[str, str]:
    match step.get("type"):
        case "ByteLevel":
            return "bytes", "words" if step.get("use_regex", True) else ""
        case "Digits":
            return "digits", "single" if step.get("individual_digits") else "together"
        case "Split":
            return "split", str(step.get("pattern", {}).get("Regex", ""))
    return str(step.get("type")), ""


def _tokens(tokenizer: Any, size: int, byte_level: bool) -> tuple[list[str], list[str]]:
    """Returns the text and the token type of each id."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        text = texts.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        if text is None:
            kinds.append("UNUSED")
        elif not byte_level and text == tokenizer.unk_token:
            kinds.append("UNKNOWN")
        elif number in added:
            kinds.append("CONTROL" if added[number].special else "USER_DEFINED")
        elif not byte_level and len(text) == 6 and text.startswith("<0x"):
            kinds.append("BYTE")
        else:
            kinds.append("NORMAL")
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> list[float]:
    """Returns token scores that make llama.cpp merge in the tokenizer's order.

    A higher score is merged earlier; tokens that are not the result of a merge get the lowest score.
    """
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    first: dict[str, int] = {}
    for order, (left, right) in enumerate(pairs):
        first.setdefault(left + right, order)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _adds(tokenizer: Any, *, first: bool) -> bool:
    """Returns whether the tokenizer adds a BOS token (``first``), or an EOS token, to a text."""
    ids = tokenizer("a")["input_ids"]
    wanted = tokenizer.bos_token_id if first else tokenizer.eos_token_id
    return bool(ids) and wanted is not None and ids[0 if first else -1] == wanted
