"""Splits evaluation rows off the training rows, and counts those that are on both sides."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

from nbpeft.display.numbers import count, plural
from nbpeft.engine.kernels.numerics import bytes_of
from nbpeft.errors import ConfigError, TrainingError, did_you_mean
from nbpeft.names import IGNORED_LABEL, REJECTED
from nbpeft.training.data.forms import row_of
from nbpeft.training.data.row import is_nothing, listed
from nbpeft.training.data.sources import is_stream
from nbpeft.training.data.tokenized import StreamedRows, TokenizedRows

_TOKENS = ("input_ids", "labels", f"{REJECTED}input_ids")
"""The columns in which equal rows are equal."""
_WHOLE = ("prompt", "instruction", "messages", "conversations", "text", "tokens", "chosen", "input_ids")
"""Names in forms, of which equal rows have the first one that they have in common."""


@dataclass(frozen=True)
class HeldOut:
    """Which rows of the data were held out from a training.

    Attributes:
        numbers: their numbers, in order; 0 is the first row.
        total: the number of rows of the data.
    """

    numbers: tuple[int, ...]
    total: int

    def also(self, earlier: HeldOut | None) -> HeldOut:
        """The rows that an earlier training on the same data did not learn either.

        Args:
            earlier: what was held out from that training; None, or of another number of rows, if the data was another.
        """
        if earlier is None or earlier.total != self.total:
            return self
        return HeldOut(tuple(sorted({*self.numbers} & {*earlier.numbers})), self.total)


def is_amount(eval_data: Any) -> bool:
    """Whether ``eval_data`` is the number or share of rows to hold out, not data itself."""
    return isinstance(eval_data, (int, float))


class Split(NamedTuple):
    """Training and evaluation rows.

    Attributes:
        train: the training rows.
        evaluation: the evaluation rows.
        places: the index of each evaluation row among all; None for a stream.
    """

    train: Any
    evaluation: Any
    places: tuple[int, ...] | None = None


def hold_out(rows: Any, amount: float, seed: int, groups: Sequence[Hashable] | None = None) -> Split:
    """Splits rows into training and evaluation rows.

    The evaluation rows are drawn at random, the same ones for the same seed. A stream keeps its order: its first rows
    are held out. With groups, whole groups are drawn, in a random order, as long as they do not exceed the amount.

    Args:
        rows: the result of ``prepare_data``.
        amount: a share between 0 and 1, or a number of rows of at least 2.
        seed: seed of the random draw.
        groups: the group of each row; None if each row is drawn on its own.

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
    generator = torch.Generator().manual_seed(seed)
    if groups is not None:
        held = _of_groups(groups, number, generator)
    else:
        held = {*torch.randperm(total, generator=generator)[:number].tolist()}
    places = tuple(sorted(held))
    return Split(_selected(rows, [row for row in range(total) if row not in held]), _selected(rows, places), places)


def _of_groups(groups: Sequence[Hashable], number: int, generator: torch.Generator) -> set[int]:
    """The rows of drawn groups, at most ``number``."""
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    held: set[int] = set()
    drawn = list(members.values())
    if len(drawn) == 1:
        raise ConfigError("all rows are one group, so that no group can be held out: pass eval_data", field="eval_data")
    for place in torch.randperm(len(drawn), generator=generator).tolist():
        if len(held) + len(drawn[place]) <= number:
            held.update(drawn[place])
    if not held:
        smallest = min(map(len, drawn))
        raise ConfigError(
            f"each of the {plural(len(drawn), 'group')} has at least {plural(smallest, 'row')}, and eval_data holds "
            f"out {number}: hold out more rows",
            field="eval_data",
        )
    return held


def groups_of(rows: Any, opened: Any, column: str | None) -> list[Hashable] | None:
    """The group of each row: rows of a group are either all trained on or all evaluated on.

    The parts of a row that was split are one group, and so are the rows with the same value in a column. A row without
    a value is a group of its own.

    Args:
        rows: the result of ``prepare_data``.
        opened: the rows as they were given.
        column: the column with the groups; None if only parts are grouped.

    Returns:
        The groups; None if each row is one.

    Raises:
        ConfigError: the rows have no such column, or are a stream.
    """
    numbers = getattr(rows, "numbers", None)
    if column is None:
        return list(numbers) if numbers is not None and len({*numbers}) < len(numbers) else None
    if is_stream(opened):
        raise ConfigError("eval_by needs all rows, and a stream holds out its first ones", field="eval_by")
    numbers = range(len(rows)) if numbers is None else numbers
    values = opened[column] if column in (getattr(opened, "column_names", None) or ()) else None
    found: list[Hashable] = []
    for number in numbers:
        if values is None:
            row = row_of(opened[number], number, {}).values
            if column not in row:
                has = f"it has {listed(row)}.{did_you_mean(column, map(str, row))}"
                raise ConfigError(f"eval_by: row {number} has no {column!r:.60}; {has}", field="eval_by")
            value = row[column]
        else:
            value = values[number]
        value = value.tolist() if hasattr(value, "tolist") else value
        found.append((number,) if is_nothing(value) else repr(value))
    return found


def hash_of(row: Mapping[str, Any]) -> int:
    """A number that is the same for rows with the same tokens and labels, or with the same other inputs.

    Args:
        row: a row as the model takes it.
    """
    if "input_ids" in row:
        return hash(tuple(_hashable(row.get(name)) for name in _TOKENS))
    return hash(tuple((name, content_of(row[name])) for name in sorted(row)))


def content_of(value: Any) -> bytes:
    """The content of a column that is not tokens: a tensor, an array, or a number."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} ".encode() + bytes_of(value)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        return repr(value).encode()
    return f"{array.dtype} {array.shape} ".encode() + array.tobytes()


def grouping(columns: Sequence[str], mapping: Mapping[str, str] | None) -> str:
    """What keeps equal rows together when rows are held out, as a line.

    Args:
        columns: the columns of the rows.
        mapping: name in a form -> column, where they differ; or None.
    """
    names = ((mapping or {}).get(name, name) for name in _WHOLE)
    column = next((name for name in names if name in columns), None)
    return f"eval_by={column!r} keeps equal rows together" if column is not None else "keep each row once"


def leaked(train: Any, evaluation: Any, kind: str = "held-out row") -> str:
    """Says how many of the rows held out are also trained on; empty if none are, or if the rows are not in memory.

    Args:
        train: the rows to train on.
        evaluation: the rows held out.
        kind: what a message calls one of them.
    """
    if not (isinstance(train, TokenizedRows) and isinstance(evaluation, TokenizedRows)):
        return ""
    learned, held = ([hash_of(rows[place]) for place in range(len(rows))] for rows in (train, evaluation))
    both = sum(map({*learned}.__contains__, held))
    if not both:
        return ""
    total = len(learned) + len(held)
    repeats = total - len({*learned, *held})
    are = "is" if both == 1 else "are"
    repeat = "is a repeat" if repeats == 1 else "are repeats"
    return (
        f"{count(both)} of the {plural(len(held), kind)} {are} also trained on "
        f"({count(repeats)} of {plural(total, 'row')} {repeat})"
    )


def learned_prompts(train: Any) -> set[tuple[int, ...]]:
    """The tokens before what is learned last in each row: its prompt, or all of a classifier's text.

    Args:
        train: the rows to train on; none are found in rows that are not in memory.
    """
    if not isinstance(train, TokenizedRows):
        return set()
    return {_prompt_of(train[place]) for place in range(len(train))}


def _prompt_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    ids: tuple[int, ...] = _hashable(row.get("input_ids", ()))
    labels = _hashable(row.get("labels"))
    if not isinstance(labels, tuple) or len(labels) != len(ids):
        return ids
    end = len(labels)
    while end and labels[end - 1] == IGNORED_LABEL:
        end -= 1
    while end and labels[end - 1] != IGNORED_LABEL:
        end -= 1
    return ids[:end]


def _check(amount: float) -> None:
    share = isinstance(amount, float) and 0 < amount < 1
    if not share and (not isinstance(amount, int) or isinstance(amount, bool) or amount < 2):
        raise ConfigError(
            f"eval_data={amount} is neither data, nor a share of the rows between 0 and 1 (0.1), nor a number of rows "
            "of at least 2 (64).",
            field="eval_data",
        )


def _of_stream(rows: Any, amount: float) -> Split:
    if not isinstance(amount, int):
        raise ConfigError(
            f"eval_data={amount}: a stream has no length to take a share of; give a number of rows, e.g. 64.",
            field="eval_data",
        )
    evaluation = list(itertools.islice(rows, amount))
    rest = rows.after(amount) if isinstance(rows, StreamedRows) else rows.skip(amount)
    if next(iter(rest), None) is None:
        raise TrainingError(f"eval_data={amount} holds out the whole stream, which leaves nothing to train on.")
    return Split(rest, TokenizedRows(evaluation))


def _selected(rows: Any, indices: Sequence[int]) -> Any:
    return rows.select(indices) if hasattr(rows, "select") else Subset(rows, indices)


def _hashable(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        return value
    # Rows of tokens are flat, and a call for each token would take seconds for large data.
    return tuple(map(_hashable, value)) if value and isinstance(value[0], (list, tuple)) else tuple(value)
