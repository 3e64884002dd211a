"""Labels that say whether a completion is good or bad, as rows for preference tuning (KTO) have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nbpeft.training.data.row import is_nothing

LABEL = "label"
_GOOD = frozenset(("true", "good", "desirable", "chosen", "correct"))
_BAD = frozenset(("false", "bad", "undesirable", "rejected", "incorrect"))


def is_good(label: Any) -> bool | None:
    """Whether a label says that a completion is good: True and 1 do, False, 0 and -1 say that it is bad.

    Args:
        label: of a row; words such as ``"good"`` and numbers as text are read, too.

    Returns:
        None of a label that says something else.
    """
    label = label.item() if getattr(label, "shape", None) == () else label
    if isinstance(label, str) and label.strip().lower() in _GOOD | _BAD:
        return label.strip().lower() in _GOOD
    try:
        return {1.0: True, 0.0: False, -1.0: False}.get(float(label))
    except (TypeError, ValueError, OverflowError):
        return None


def are_verdicts(labels: Iterable[Any]) -> bool:
    """Whether all labels of a column say that a completion is good or bad; one that does not makes them classes."""
    return all(is_nothing(label) or is_good(label) is not None for label in labels)


def labels_in(rows: Any, column: str) -> Iterable[Any]:
    """A column of rows, which are dictionaries or lack it; of a dataset it is read alone."""
    selected = rows.select_columns(column) if hasattr(rows, "select_columns") else rows
    return (row.get(column) for row in selected if isinstance(row, Mapping))
