"""Tokenized rows, and the encoding of text with marked spans as token ids and labels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from nbpeft.names import IGNORED_LABEL, LOSS_WEIGHTS, REJECTED
from nbpeft.training.data.left_out import Unused

CONTEXT = 8
"""How many tokens before others are read for the space between them, so that the cost does not grow with the row."""
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
    """One tokenized row.

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


@dataclass(frozen=True)
class CodedRow:
    """One tokenized row, before truncation.

    Attributes:
        number: 0 for the first.
        whole: The whole row.
        limit: The greatest number of tokens; the rest is cut off.
        encoder_decoder: Whether the labels are a sequence of their own, not one for each input token.
        reason: Why there is nothing to train on, if that is known before truncation.
        own_labels: Whether a label is that of its token, not of the next one.
        label: The label of a text for a classifier; None if there is one for each token.
        more: Other columns of the row for the model. For a classifier they include ``input_ids`` (and the labels of
            tokens) as truncated by the tokenizer, which keeps special tokens at the end.
        weight: The factor on the loss of ``label``.
        unused: The parts of the row that are not trained on.
        system: The system prompt, empty if there is none; None for a row without the chat template.
        joint: The text around the joint of prompt and completion, if nothing separates them; else empty.
        rejected: The row with the rejected completion; None if there is one completion.
        dropped: Whether the row is left out because it is too long.
        part: Which part of a row it is, 0 for the first.
        part_count: The number of parts into which the row is split.
        prompted: For a row with a prompt alone: the prompt and the other columns, as reward functions get them.
        pieces: The parts into which the row is split, if tokens alone do not say where; empty if they do.
        inputs: For a row without tokens: the inputs of the model.
    """

    number: int
    whole: Encoded
    limit: int
    encoder_decoder: bool = False
    reason: str = ""
    label: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    unused: tuple[Unused, ...] = ()
    system: str | None = None
    joint: str = ""
    rejected: CodedRow | None = None
    dropped: bool = False
    part: int = 0
    part_count: int = 1
    prompted: Mapping[str, Any] | None = None
    own_labels: bool = False
    pieces: tuple[CodedRow, ...] = ()
    inputs: Mapping[str, Any] | None = None

    @property
    def row(self) -> dict[str, Any]:
        """The truncated row, as the collator takes it."""
        if self.inputs is not None:
            return dict(self.inputs)
        if self.prompted is not None:
            return {"input_ids": self.whole.input_ids, **self.prompted}
        ids, labels, weights = self.whole.input_ids[: self.limit], self.whole.labels[: self.limit], self.whole.weights
        if self.rejected is not None:
            other = {f"{REJECTED}{name}": value for name, value in self.rejected.row.items()}
            return {"input_ids": ids, "labels": labels, **self.more, **other}
        if self.label is not None:
            weighted = {LOSS_WEIGHTS: self.weight} if self.weight != 1 else {}
            return {"input_ids": ids, "labels": self.label, **self.more, **weighted}
        if weights is None:
            return {"input_ids": ids, "labels": labels, **self.more}
        return {"input_ids": ids, "labels": labels, **self.more, LOSS_WEIGHTS: weights[: self.limit]}

    @property
    def cut(self) -> bool:
        """Whether the row is too long and is truncated."""
        if self.prompted is not None:  # a longer prompt is left out: its end is what is answered
            return False
        rejected = self.rejected is not None and self.rejected.cut
        is_long = rejected or len(self.whole.input_ids) > self.limit or len(self.whole.labels) > self.limit
        return is_long and not self.dropped

    def fitted(self, long: str) -> Iterator[CodedRow]:
        """The row, or its parts, within the greatest length.

        Each part begins with the last token of the part before, so that the part's own first token is predicted, too.

        Args:
            long: see ``RowOptions``.
        """
        if not self.cut or long == "cut":
            yield self
        elif long == "drop":
            yield replace(self, dropped=True, reason=self.reason or f"longer than {self.limit} tokens (long='drop')")
        elif self.pieces:
            for part, piece in enumerate(self.pieces):
                yield replace(piece, part=part, part_count=len(self.pieces), unused=() if part else self.unused)
        else:
            starts = range(0, len(self.whole.input_ids) - 1, max(1, self.limit - 1))
            for part, start in enumerate(starts):
                whole = self.whole.between(start, start + self.limit)
                unused = () if part else self.unused
                yield replace(self, whole=whole, part=part, part_count=len(starts), unused=unused)

    @property
    def learned_count(self) -> int:
        """The number of labels that count in the loss."""
        if self.prompted is not None or self.inputs is not None:
            return 0
        return (
            1 if self.label is not None else count_learned(self.row["labels"], self.encoder_decoder or self.own_labels)
        )

    @property
    def missing(self) -> str:
        """Why there is nothing to train on; empty if there is something."""
        if self.reason or self.prompted is not None or self.inputs is not None or self.learned_count:
            return self.reason or ("" if self.rejected is None else self.rejected.missing)
        return f"nothing to learn within {self.limit} tokens" if self.cut else "nothing to learn"


def count_learned(labels: Sequence[int], encoder_decoder: bool = False) -> int:
    """How many tokens a loss is taken on: a decoder does not predict the first one."""
    return sum(label != IGNORED_LABEL for label in (labels if encoder_decoder else labels[1:]))


def encode(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool = True, whole: bool = False) -> Encoded:
    """Tokenizes ``text``, with labels on the tokens that touch one of ``spans``.

    Prompt and completion are tokenized together, as the model reads them; a token that
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

    The token at the border of a span is found by tokenizing the text before the border and counting the tokens that it
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


def decoded(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens that follow others, with its leading space.

    Args:
        tokenizer: the tokenizer.
        before: the tokens before them; the last ``CONTEXT`` are read.
        tokens: the tokens.
        special: whether to include the text of special tokens.
    """
    options = {"clean_up_tokenization_spaces": False} if hasattr(tokenizer, "clean_up_tokenization_spaces") else {}

    def plain(ids: Iterable[int]) -> str:
        return str(tokenizer.decode([int(token) for token in ids], skip_special_tokens=not special, **options))

    # Many tokenizers drop the leading space of the first token.
    start, through = plain(before[-CONTEXT:]), plain([*before[-CONTEXT:], *tokens])
    return through[len(start) :] if through.startswith(start) else plain(tokens)
