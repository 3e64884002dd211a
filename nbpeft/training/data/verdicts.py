"""Labels that mark a completion as good or bad, as in rows for preference tuning (KTO)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nbpeft.training.data.row import is_nothing

LABEL = "label"
_GOOD = frozenset(("true", "good", "desirable", "chosen", "correct"))
_BAD = frozenset(("false", "bad", "undesirable", "rejected", "incorrect"))


def is_good(label: Any) -> bool | None:
    """Whether a label marks a completion as good: True and 1 do; False, 0 and -1 mark it as bad.

    Args:
        label: the label of a row; words such as ``"good"`` and numbers as text are recognized too.

    Returns:
        None for a label with another meaning.
    """
    label = label.item() if getattr(label, "shape", None) == () else label
    if isinstance(label, str) and label.strip().lower() in _GOOD | _BAD:
        return label.strip().lower() in _GOOD
    try:
        return {1.0: True, 0.0: False, -1.0: False}.get(float(label))
    except (TypeError, ValueError, OverflowError):
        return None


def are_verdicts(labels: Iterable[Any]) -> bool:
    """Whether all labels of a column mark completions as good or bad; with any other label they are classes."""
    return all(is_nothing(label) or is_good(label) is not None for label in labels)


def labels_in(rows: Any, column: str) -> Iterable[Any]:
    """The values of a column.

    Args:
        rows: the rows; those that are not dictionaries are skipped. Of a dataset only this column is read.
        column: the name of the column.
    """
    selected = rows.select_columns(column) if hasattr(rows, "select_columns") else rows
    return (row.get(column) for row in selected if isinstance(row, Mapping))
