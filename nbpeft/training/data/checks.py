"""Checks that rows fit a model, before a training step fails on them with an error that names no row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nbpeft.errors import TrainingError
from nbpeft.names import IGNORED_LABEL, REJECTED
from nbpeft.training.data.classes import Classes
from nbpeft.training.data.reading import LABELS

_CHECKED_ROWS = 10_000
"""The number of rows that are checked; the others are assumed to be alike."""


def check_rows(rows: Any, *, vocabulary: int | None, causal: bool, classes: Classes | None = None) -> None:
    """Checks the token ids and labels of rows.

    Args:
        rows: A dataset of dictionaries with ``input_ids``.
        vocabulary: The number of rows of the model's embedding; None if unknown.
        causal: Whether there is one label for each token.
        classes: The classes, if the model is a classifier.

    Raises:
        TrainingError: a row does not fit the model, and the message names it; or no row has a label to be learned.
    """
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return
    learned, numbers = not causal or classes is not None, getattr(rows, "numbers", None)
    for index in range(min(len(rows), _CHECKED_ROWS)):
        row = rows[index]
        if not isinstance(row, Mapping) or "input_ids" not in row:
            return
        check_row(
            row, index if numbers is None else numbers[index], vocabulary=vocabulary, causal=causal, classes=classes
        )
        learned = learned or _is_learned(row)
    if 0 < len(rows) <= _CHECKED_ROWS and not learned:
        raise TrainingError(
            f"None of the {len(rows):,} rows has a label to be learned: all are {IGNORED_LABEL} or masked."
        )


def _is_learned(row: Mapping[str, Any]) -> bool:
    """Whether a row has a label that is to be learned."""
    labels = next((row[name] for name in LABELS if row.get(name) is not None), None)
    if labels is None:
        return bool(torch.as_tensor(row.get("attention_mask", 1)).any())
    return bool(torch.as_tensor(labels).ne(IGNORED_LABEL).any())


def check_row(
    row: Mapping[str, Any], index: int, *, vocabulary: int | None, causal: bool, classes: Classes | None = None
) -> None:
    """Checks the token ids and labels of one row.

    Args:
        row: The row.
        index: Its number, for messages.
        vocabulary: See :func:`check_rows`.
        causal: See :func:`check_rows`.
        classes: See :func:`check_rows`.

    Raises:
        TrainingError: The row does not fit the model.
    """
    if f"{REJECTED}input_ids" in row:
        rejected = {name: row[f"{REJECTED}{name}"] for name in ("input_ids", "labels")}
        check_row(rejected, index, vocabulary=vocabulary, causal=causal)
    ids = _token_ids(row["input_ids"], index)
    outside = ids[(ids < 0) | (ids >= vocabulary)] if vocabulary is not None else ids[:0]
    if len(outside):
        raise TrainingError(
            f"Row {index} has the token id {int(outside[0])}, but the model knows ids from 0 to "
            f"{(vocabulary or 0) - 1}: tokenize with the tokenizer of this model.",
            index=index,
        )
    mask = row.get("attention_mask")
    if mask is not None and len(mask) != len(ids):
        raise TrainingError(f"Row {index} has an attention_mask of {len(mask)} for {len(ids)} tokens.", index=index)
    labels = next((row[name] for name in LABELS if name in row), None)
    if classes is not None and classes.per_token:
        _check_tags(labels, len(ids), index, classes)
    elif classes is not None:
        _check_label(labels, index, classes)
    elif causal and labels is not None and (not hasattr(labels, "__len__") or getattr(labels, "ndim", 1) == 0):
        raise TrainingError(
            f"Row {index} has one label ({labels!r:.40}), and a language model learns one for each token.", index=index
        )
    elif causal and labels is not None and len(labels) != len(ids):
        raise TrainingError(f"Row {index} has {len(labels)} labels for {len(ids)} tokens.", index=index)


def _check_tags(given: Any, tokens: int, index: int, classes: Classes) -> None:
    """Refuses labels of tokens that a classifier would misread or reject."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, list | tuple):
        raise TrainingError(f"Row {index} has no list of labels: give the class of each token.", index=index)
    if len(values) != tokens:
        raise TrainingError(f"Row {index} has {len(values)} labels for {tokens} tokens.", index=index)
    for value in values:
        if value != IGNORED_LABEL:
            _check_label(value, index, classes)


def _check_label(given: Any, index: int, classes: Classes) -> None:
    """Refuses a label of a tokenized row that a classifier would misread or reject."""
    if given is None:
        raise TrainingError(f"Row {index} has no labels: give the class of each row.", index=index)
    value = given.tolist() if hasattr(given, "tolist") else given
    try:
        label = classes.label(value)
    except ValueError as error:
        raise TrainingError(f"Row {index}: the label is {given!r:.40}; {error}.", index=index) from None
    if type(label) is not type(value):
        raise TrainingError(
            f"Row {index}: the label is {given!r:.40}; tokenized rows give it as the model takes it: {label!r:.40}.",
            index=index,
        )


def _token_ids(value: Any, index: int) -> Tensor:
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, 0)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise TrainingError(f"Row {index}: input_ids must be a list of token ids, not {value!r:.60}.", index=index)
    return ids
