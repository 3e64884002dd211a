"""Text with marked parts becomes token ids and labels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbpeft.names import IGNORED_LABEL

_FAR = sys.maxsize
"""Behind the end of every text."""


class Span(NamedTuple):
    """A part of a text that is learned.

    Attributes:
        first: its first character.
        last: the one after its last.
        weight: how much the loss on it counts.
    """

    first: int
    last: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """One tokenised row.

    Attributes:
        input_ids: of the tokens that are read.
        labels: of a decoder one for each token, ``IGNORED_LABEL`` where nothing is learned.
        weights: how much the loss on each label counts; None where all count alike.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None

    def weighted(self, factor: float) -> Encoded:
        """The same row, of which every label counts so much more or less."""
        if factor == 1:
            return self
        weights = [1.0] * len(self.labels) if self.weights is None else self.weights
        return Encoded(self.input_ids, self.labels, [factor * weight for weight in weights])


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
        weights = _by_offsets(encoding["offset_mapping"], spans)
    else:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        weights = _by_prefix(tokenizer, text, ids, spans, special)
    if whole:
        weights = [1.0] * len(ids)
    end = getattr(tokenizer, "eos_token_id", None)
    if special and end is not None:
        if ids and ids[-1] == end:
            weights[-1] = 1.0
        else:
            ids, weights = [*ids, end], [*weights, 1.0]
    labels = [token if weight else IGNORED_LABEL for token, weight in zip(ids, weights, strict=True)]
    return Encoded(ids, labels, None if {0.0, 1.0}.issuperset(weights) else weights)


def _by_offsets(offsets: Iterable[tuple[int, int]], spans: Sequence[Span]) -> list[float]:
    """The weight of each token: that of the first span that it touches, and 0 outside of all."""
    following = iter((*spans, Span(_FAR, _FAR, 0.0)))
    first, last, weight = next(following)
    found = []
    for start, end in offsets:
        while start >= last:
            first, last, weight = next(following)
        found.append(weight if end > first else 0.0)
    return found


def _by_prefix(tokenizer: Any, text: str, ids: list[int], spans: Sequence[Span], special: bool) -> list[float]:
    """Without offsets: how many tokens a beginning of the text has in common with the whole."""

    def tokens_before(character: int) -> int:
        if character >= len(text):
            return len(ids)
        beginning = tokenizer(text[:character], add_special_tokens=special)["input_ids"]
        pairs = enumerate(zip(beginning, ids, strict=False))
        return next((index for index, (one, other) in pairs if one != other), min(len(beginning), len(ids)))

    borders = [(tokens_before(first), tokens_before(last), weight) for first, last, weight in spans]
    return [
        max((weight for first, last, weight in borders if first <= index < last), default=0.0)
        for index in range(len(ids))
    ]
