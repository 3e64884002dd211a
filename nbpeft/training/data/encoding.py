"""Text with marked parts becomes token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100
"""The label that no loss is taken on."""

Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised row; for decoders both lists have one entry per token."""

    input_ids: list[int]
    labels: list[int]


def encode(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool = True, whole: bool = False) -> Encoded:
    """Tokenises ``text``, with labels on the tokens that touch one of ``spans``.

    Prompt and completion are tokenised together, as they would be read together; a token that
    reaches over the border belongs to the completion.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The whole row.
        spans: Parts to learn, in characters.
        special: Whether the tokenizer may add its special tokens, and an end-of-text token is
            learned after the row. False for chats, whose template has written them.
        whole: Whether every token is learned.
    """
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        learned = [
            any(start < last and end > first for first, last in spans) for start, end in encoding["offset_mapping"]
        ]
    else:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        learned = _by_prefix(tokenizer, text, ids, spans, special)
    labels = [token if whole or learns else IGNORED for token, learns in zip(ids, learned, strict=True)]
    end = getattr(tokenizer, "eos_token_id", None)
    if special and end is not None:
        if ids and ids[-1] == end:
            labels[-1] = end
        else:
            ids, labels = [*ids, end], [*labels, end]
    return Encoded(ids, labels)


def _by_prefix(tokenizer: Any, text: str, ids: list[int], spans: Sequence[Span], special: bool) -> list[bool]:
    """Without offsets: how many tokens a beginning of the text has in common with the whole."""

    def tokens_before(character: int) -> int:
        if character >= len(text):
            return len(ids)
        beginning = tokenizer(text[:character], add_special_tokens=special)["input_ids"]
        pairs = enumerate(zip(beginning, ids, strict=False))
        return next((index for index, (one, other) in pairs if one != other), min(len(beginning), len(ids)))

    borders = [(tokens_before(first), tokens_before(last)) for first, last in spans]
    return [any(first <= index < last for first, last in borders) for index in range(len(ids))]
