"""Encodes text with marked spans as token ids and labels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbpeft.names import IGNORED_LABEL

_FAR = sys.maxsize
"""A position after the end of any text."""


class Span(NamedTuple):
    """A part of a text to train on.

    Attributes:
        first: index of its first character.
        last: index after its last character.
        weight: the factor on its loss.
    """

    first: int
    last: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """One tokenised row.

    Attributes:
        input_ids: ids of the model's input tokens.
        labels: for a decoder, one for each token; ``IGNORED_LABEL`` where there is no loss.
        weights: the factor on the loss of each label; None if all are equal.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None

    def between(self, first: int, last: int) -> Encoded:
        """The tokens from one place up to another, with their labels."""
        weights = None if self.weights is None else self.weights[first:last]
        return Encoded(self.input_ids[first:last], self.labels[first:last], weights)

    def weighted(self, factor: float) -> Encoded:
        """The same row with the weights of all labels multiplied by a factor."""
        if factor == 1:
            return self
        weights = [1.0] * len(self.labels) if self.weights is None else self.weights
        return Encoded(self.input_ids, self.labels, [factor * weight for weight in weights])


def encode(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool = True, whole: bool = False) -> Encoded:
    """Tokenises ``text``, with labels on the tokens that touch one of ``spans``.

    Prompt and completion are tokenised together, as the model reads them; a token that
    spans the border between them belongs to the completion.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The whole row.
        spans: Parts to train on, in characters, in order.
        special: Whether the tokenizer adds its special tokens, and an end-of-text token is
            appended and trained on. False for chats, whose template has added them.
        whole: Whether to train on every token.
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
    """The weight of each token: that of the first span it overlaps, or 0 if it overlaps none."""
    following = iter((*spans, Span(_FAR, _FAR, 0.0)))
    first, last, weight = next(following)
    weights = []
    for start, end in offsets:
        while start >= last:
            first, last, weight = next(following)
        weights.append(weight if end > first else 0.0)
    return weights


def _by_prefix(tokenizer: Any, text: str, ids: list[int], spans: Sequence[Span], special: bool) -> list[float]:
    """The weight of each token without offsets (slow tokenizers have none).

    The token at the border of a span is found by tokenising the text before the border and counting the tokens that it
    shares with the whole text.
    """

    def tokens_before(character: int) -> int:
        if character >= len(text):
            return len(ids)
        beginning = tokenizer(text[:character], add_special_tokens=special)["input_ids"]
        pairs = enumerate(zip(beginning, ids, strict=False))
        return next((index for index, (left, right) in pairs if left != right), min(len(beginning), len(ids)))

    borders = [(tokens_before(first), tokens_before(last), weight) for first, last, weight in spans]
    return [
        max((weight for first, last, weight in borders if first <= index < last), default=0.0)
        for index in range(len(ids))
    ]
