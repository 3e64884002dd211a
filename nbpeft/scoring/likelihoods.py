"""Losses, choices by likelihood, and classes, in mixed batches without generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.tree.model_tree import embedding_of, manager_of
from nbpeft.model.from_data.observing import device_of, moved
from nbpeft.model.handle.serving import serving_rows
from nbpeft.names import IGNORED_LABEL, LOSS_WEIGHTS
from nbpeft.scoring.settings import Column, batches, in_parts, passes, serving_alone
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.loop.rows import collator_for, is_encoder_decoder

_LOGITS = 2**26
"""The greatest number of logits in one batch, with which it takes some hundred megabytes."""
Coded = Mapping[str, Any]
Outputs = list[tuple[int, int, Any]]
"""The index of a row, the index of a column, and what was computed."""


def token_losses(
    model: nn.Module,
    rows: Sequence[Coded],
    columns: Sequence[Column],
    *,
    size: int,
    tokenizer: Any = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Outputs]:
    """Computes the sum of the losses of each row's labels, and the sum of their weights, batch by batch.

    Args:
        model: the model in evaluation mode.
        rows: tokenized rows with labels.
        columns: what computes them.
        size: the greatest number of rows of a batch; fewer if their logits are large.
        tokenizer: the tokenizer, for the padding token; or None.
        should_stop: called after each batch; True ends it.
    """
    encoder_decoder = is_encoder_decoder(model)

    def compute(batch: dict[str, Any]) -> list[tuple[float, float]]:
        labels = batch["labels"]
        weights = batch.pop(LOSS_WEIGHTS, None)
        if not encoder_decoder:
            batch = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**batch).logits[:, -labels.shape[1] :]  # a learned prompt may precede the tokens
        if not encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
            weights = None if weights is None else weights[:, 1:]
        return _sums(logits, labels, weights)

    yield from _computed(model, rows, columns, compute, tokenizer, size, should_stop)


def _sums(logits: Tensor, labels: Tensor, weights: Tensor | None) -> list[tuple[float, float]]:
    """The weighted sum of the losses of each row's labels, and the sum of the weights."""
    labels = labels.to(logits.device)
    learned = labels != IGNORED_LABEL
    losses = F.cross_entropy(logits[learned].float(), labels[learned], reduction="none").double()
    factors = torch.ones_like(losses) if weights is None else weights.to(logits.device)[learned].double()
    row_of = learned.nonzero()[:, 0]
    empty = losses.new_zeros(len(labels))
    sums = empty.index_add(0, row_of, losses * factors).tolist(), empty.index_add(0, row_of, factors).tolist()
    return list(zip(*sums, strict=True))


def classes(
    model: nn.Module,
    rows: Sequence[Coded],
    columns: Sequence[Column],
    *,
    size: int,
    tokenizer: Any = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Outputs]:
    """Computes the class of each row, batch by batch; None if a logit is not a number.

    The arguments are those of ``token_losses``; the rows need no labels.
    """

    def compute(batch: dict[str, Any]) -> list[int | None]:
        logits = model(**{name: value for name, value in batch.items() if name not in ("labels", LOSS_WEIGHTS)}).logits
        chosen: list[int] = logits.argmax(-1).tolist()
        bad: list[bool] = logits.isnan().any(-1).tolist()
        return [None if is_bad else number for number, is_bad in zip(chosen, bad, strict=True)]

    with _padding_token(base_of(model), tokenizer):
        yield from _computed(model, rows, columns, compute, tokenizer, size, should_stop)


@contextmanager
def _padding_token(base: Any, tokenizer: Any) -> Iterator[None]:
    """Gives a classifier, which finds the last token of a row by it, the padding token while the block runs."""
    if base.config.pad_token_id is not None or tokenizer is None:
        yield
        return
    base.config.pad_token_id = tokenizer.pad_token_id
    try:
        yield
    finally:
        base.config.pad_token_id = None


def _computed(
    model: nn.Module,
    rows: Sequence[Coded],
    columns: Sequence[Column],
    compute: Callable[[dict[str, Any]], Sequence[Any]],
    tokenizer: Any,
    size: int,
    should_stop: Callable[[], bool] | None,
) -> Iterator[Outputs]:
    """Calls the model on rows of about the same length, all columns of mixed batches in one call."""
    collate, device = collator_for(model, tokenizer), device_of(base_of(model))
    padding = getattr(getattr(base_of(model), "config", None), "pad_token_id", None)
    collate.pad_token_id = collate.pad_token_id if padding is None else padding
    vocabulary = getattr(embedding_of(base_of(model)), "num_embeddings", 1)

    def fits(longest: int) -> int:
        return min(size, _LOGITS // (max(1, longest) * vocabulary * len(columns)))

    def values_of(places: Sequence[int]) -> Outputs:
        found: Outputs = []
        for together in passes(columns):
            chosen = [columns[number] for number in together]
            inputs = moved(collate([rows[place] for _ in chosen for place in places]), device)
            with torch.no_grad(), _serving(model, chosen, len(places), inputs):
                values = compute(inputs)
            cells = [(place, column) for column in together for place in places]
            found += [(*cell, value) for cell, value in zip(cells, values, strict=True)]
        return found

    for places in batches([len(row["input_ids"]) for row in rows], fits):
        yield in_parts(values_of, places) or []
        if should_stop is not None and should_stop():
            return


def _serving(
    model: nn.Module, columns: Sequence[Column], count: int, inputs: Mapping[str, Any]
) -> AbstractContextManager[None]:
    manager = manager_of(model)
    if not columns[0].row or manager is None:
        return serving_alone(model, columns[0])
    names = [column.row for column in columns for _ in range(count)]
    return serving_rows(manager, names, (), inputs, disabled_too=True)
