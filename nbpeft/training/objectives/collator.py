"""Batches of rows with a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.names import REJECTED
from nbpeft.training.data import Collator

_COLUMNS = ("input_ids", "labels")


@dataclass
class PairCollator:
    """Collates rows into one batch, with the rejected completions in columns of their own.

    All sequences of a batch are padded to one length.

    Attributes:
        collator: pads the rows.
    """

    collator: Collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates rows: ``input_ids``, ``rejected_input_ids`` etc., each of shape (rows, longest)."""
        parts = [[{name: row[f"{prefix}{name}"] for name in _COLUMNS} for row in rows] for prefix in ("", REJECTED)]
        both, count = self.collator([*parts[0], *parts[1]]), len(rows)
        chosen = {name: values[:count] for name, values in both.items()}
        return {**chosen, **{f"{REJECTED}{name}": values[count:] for name, values in both.items()}}


def stacked(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sequences of a batch below each other: first those with the chosen, then those with the rejected completions.

    Args:
        batch: a batch from a :class:`PairCollator`.
    """
    names = [name for name in batch if not name.startswith(REJECTED)]
    return {name: torch.cat([batch[name], batch[f"{REJECTED}{name}"]]) for name in names}
