"""The rows that a model is trained and evaluated on: prepared for it, and checked against it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from nbpeft.display.numbers import count, plural
from nbpeft.engine.model_tree import embedding_of
from nbpeft.errors import ConfigError, with_article
from nbpeft.training.adapted import base_of, call_columns
from nbpeft.training.data import (
    Collator,
    StreamedRows,
    TokenizedRows,
    check_rows,
    hold_out,
    is_amount,
    open_data,
    prepare_data,
)
from nbpeft.training.data.checks import check_row

BATCH_SIZE = 8
"""Rows that a model is shown at once, where nothing is learned: that of ``TrainingArguments``."""


@dataclass(frozen=True)
class TrainingRows:
    """What a Trainer is given.

    Attributes:
        train: rows to learn.
        evaluation: rows to measure on, or None.
        notes: what was cut, left out or held out, one each.
        lossy: whether something was cut or left out.
    """

    train: Any
    evaluation: Any = None
    notes: tuple[str, ...] = ()
    lossy: bool = False


def training_rows(
    model: nn.Module,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: Any = None,
) -> TrainingRows:
    """Prepares data for a model.

    Args:
        model: adapted or bare.
        data: see :func:`prepare_data`.
        eval_data: the same; or how many rows of ``data`` to hold out: a share (0.1) or a number (64).
        tokenizer: see :func:`prepare_data`.
        max_length: see :func:`prepare_data`.
        columns: see :func:`prepare_data`; of ``eval_data``, too.
        seed: of the training, by which held-out rows are drawn; by default that of a Trainer, 42.

    Raises:
        ConfigError: an argument is impossible.
        TrainingError: the data cannot be read, or does not fit the model.
    """
    prepare = partial(_prepared, model, tokenizer=tokenizer, max_length=max_length, columns=columns)
    rows = prepare(data)
    if not is_amount(eval_data):
        evaluation = None if eval_data is None else prepare(eval_data)
        notes = _notes(rows, evaluation)
        return TrainingRows(rows, evaluation, notes, bool(notes))
    train, evaluation = hold_out(rows, eval_data, seed if isinstance(seed, int) else 42)
    known = f" of {count(len(rows))}" if hasattr(rows, "__len__") else ""
    held = f"{plural(len(evaluation), 'row')}{known} held out to evaluate on"
    notes = _notes(rows)
    return TrainingRows(train, evaluation, (*notes, held), bool(notes))


def collator_for(model: nn.Module, tokenizer: Any) -> Collator:
    """What makes batches of rows, padded with the token that the tokenizer or the model's config names."""
    config = getattr(base_of(model), "config", None)
    candidates = [
        getattr(owner, name, None) for owner in (tokenizer, config) for name in ("pad_token_id", "eos_token_id")
    ]
    pad = next((int(token) for token in candidates if isinstance(token, int)), 0)
    return Collator(pad_token_id=pad, copy_labels=is_causal(model))


@dataclass(frozen=True)
class FirstRows:
    """The first rows of data as a training would give them to a model.

    Attributes:
        rows: tokenised.
        collate: makes a batch of some of them.
    """

    rows: Sequence[Mapping[str, Any]]
    collate: Collator

    def batches(self, size: int = BATCH_SIZE, *, labels: bool = True) -> list[dict[str, Tensor]]:
        """Their batches.

        Args:
            size: rows of a batch.
            labels: whether the labels are among a batch's tensors.
        """
        found = [self.collate(self.rows[first : first + size]) for first in range(0, len(self.rows), size)]
        return [{name: value for name, value in batch.items() if labels or name != "labels"} for batch in found]


def first_rows(model: nn.Module, data: Any, *, rows: int, tokenizer: Any = None, **reading: Any) -> FirstRows:
    """The first rows of data as a training would give them to the model.

    Args:
        model: adapted or bare.
        data: see :func:`prepare_data`.
        rows: how many, at most.
        tokenizer: see :func:`prepare_data`.
        **reading: ``columns`` and ``max_length``; see :func:`prepare_data`.

    Raises:
        ConfigError: an argument is impossible.
        TrainingError: the data cannot be read, or does not fit the model.
    """
    prepared = training_rows(model, open_data(data), tokenizer=tokenizer, **reading).train
    return FirstRows(list(itertools.islice(iter(prepared), rows)), collator_for(model, tokenizer))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether prompt and completion go to different halves of the model."""
    return bool(getattr(getattr(base_of(model), "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Whether labels stand beside the ids, one for one."""
    return not is_encoder_decoder(model) and embedding_of(base_of(model), output=True) is not None


def check_reading(tokenizer: Any, max_length: Any) -> None:
    """Refuses what cannot tokenise.

    Raises:
        ConfigError: the tokenizer is none, or the length is impossible.
    """
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ConfigError(f"max_length must be a whole number of at least 1, not {max_length!r}", field="max_length")
    if tokenizer is not None and (not callable(tokenizer) or isinstance(tokenizer, nn.Module)):
        what = ", which is a model" if isinstance(tokenizer, nn.Module) else ""
        raise ConfigError(f"tokenizer must be a tokenizer, not {with_article(tokenizer)}{what}", field="tokenizer")


def _prepared(
    model: nn.Module, data: Any, *, tokenizer: Any, max_length: int | None, columns: Mapping[str, str] | None
) -> Any:
    check_reading(tokenizer, max_length)
    apart, also = is_encoder_decoder(model), call_columns(model)
    rows = prepare_data(data, tokenizer, max_length=max_length, encoder_decoder=apart, columns=columns, also=also)
    size = getattr(embedding_of(base_of(model)), "num_embeddings", None)
    check: dict[str, Any] = {"vocabulary": size if isinstance(size, int) else None, "causal": is_causal(model)}
    if isinstance(rows, StreamedRows):
        rows.check = partial(check_row, **check)
    else:
        check_rows(rows, **check)
    return rows


def _notes(*parts: Any) -> tuple[str, ...]:
    return tuple(part.notes for part in parts if isinstance(part, TokenizedRows) and part.notes)
