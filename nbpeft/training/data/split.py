"""Splits evaluation rows off the training rows."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils.data import Subset

from nbpeft.display.numbers import count
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training.data.sources import is_stream
from nbpeft.training.data.tokenized import StreamedRows, TokenizedRows


def is_amount(eval_data: Any) -> bool:
    """Whether ``eval_data`` is the number or share of rows to hold out, not data itself."""
    return isinstance(eval_data, (int, float))


def hold_out(rows: Any, amount: float, seed: int) -> tuple[Any, Any]:
    """Splits rows into training and evaluation rows.

    The evaluation rows are drawn at random, the same ones for the same seed. A stream keeps its order: its first rows
    are held out.

    Args:
        rows: the result of ``prepare_data``.
        amount: a share between 0 and 1, or a number of rows of at least 2.
        seed: seed of the random draw.

    Returns:
        The training rows and the evaluation rows.

    Raises:
        ConfigError: the amount is neither, or leaves nothing to train on.
        TrainingError: the amount holds out the whole stream.
    """
    _check(amount)
    if is_stream(rows):
        return _of_stream(rows, amount)
    total = len(rows)
    number = amount if isinstance(amount, int) else max(1, round(amount * total))
    if number >= total:
        raise ConfigError(
            f"eval_data={amount} holds out {count(number)} of {count(total)} rows, which leaves nothing to train on.",
            field="eval_data",
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return _selected(rows, sorted(order[number:])), _selected(rows, sorted(order[:number]))


def _check(amount: float) -> None:
    share = isinstance(amount, float) and 0 < amount < 1
    if not share and (not isinstance(amount, int) or isinstance(amount, bool) or amount < 2):
        raise ConfigError(
            f"eval_data={amount} is neither data, nor a share of the rows between 0 and 1 (0.1), nor a number of rows "
            "of at least 2 (64).",
            field="eval_data",
        )


def _of_stream(rows: Any, amount: float) -> tuple[Any, Any]:
    if not isinstance(amount, int):
        raise ConfigError(
            f"eval_data={amount}: a stream has no length to take a share of; give a number of rows, e.g. 64.",
            field="eval_data",
        )
    evaluation = list(itertools.islice(rows, amount))
    rest = rows.after(amount) if isinstance(rows, StreamedRows) else rows.skip(amount)
    if next(iter(rest), None) is None:
        raise TrainingError(f"eval_data={amount} holds out the whole stream, which leaves nothing to train on.")
    return rest, TokenizedRows(evaluation)


def _selected(rows: Any, indices: list[int]) -> Any:
    return rows.select(indices) if hasattr(rows, "select") else Subset(rows, indices)
