"""Rows that are equal to another one, and those held out for evaluation that are also trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbpeft.display.numbers import count, plural
from nbpeft.names import REJECTED
from nbpeft.training.data.tokenized import TokenizedRows

_TOKENS = ("input_ids", "labels", f"{REJECTED}input_ids")
"""The columns in which equal rows are equal."""
_WHOLE = ("prompt", "instruction", "messages", "conversations", "text", "tokens", "chosen", "input_ids")
"""Names in forms, of which equal rows have the first one that they have in common."""


def hash_of(row: Mapping[str, Any]) -> int:
    """A number that is the same for rows with the same tokens and labels.

    Args:
        row: a tokenised row.
    """
    return hash(tuple(_hashable(row.get(name)) for name in _TOKENS))


def grouping(columns: Sequence[str], mapping: Mapping[str, str] | None) -> str:
    """What keeps equal rows together when rows are held out, as a line.

    Args:
        columns: the columns of the rows.
        mapping: name in a form -> column, where they differ; or None.
    """
    names = ((mapping or {}).get(name, name) for name in _WHOLE)
    column = next((name for name in names if name in columns), None)
    return f"groups by {column!r} (eval_by) keep equal rows together" if column is not None else "keep each row once"


def leaked(train: Any, evaluation: Any) -> str:
    """Says how many of the rows held out are also trained on; empty if none are, or if the rows are not in memory.

    Args:
        train: the rows to train on.
        evaluation: the rows held out.
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
        f"{count(both)} of the {plural(len(held), 'held-out row')} {are} also trained on "
        f"({count(repeats)} of {plural(total, 'row')} {repeat})"
    )


def _hashable(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
