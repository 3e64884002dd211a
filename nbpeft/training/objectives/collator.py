"""Batches of rows with a chosen and a rejected completion, or with a completion of another row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.names import IGNORED_LABEL, REJECTED
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
        rejected = [{name: row[f"{REJECTED}{name}"] for name in _COLUMNS} for row in rows]
        chosen = [{name: value for name, value in row.items() if not name.startswith(REJECTED)} for row in rows]
        # Other columns, such as the task of a row, belong to both of its completions.
        both = self.collator([*chosen, *({**row, **other} for row, other in zip(chosen, rejected, strict=True))])
        count, sequences = len(rows), (*_COLUMNS, "attention_mask")
        batch = {name: values[:count] for name, values in both.items()}
        return {**batch, **{f"{REJECTED}{name}": both[name][count:] for name in sequences}}


@dataclass
class ShiftedCollator:
    """Collates rows with one completion into batches of pairs: a row, and its prompt with the completion of another.

    The prompt of a row is followed by the completion of the row before it in the batch, that of the first by the last.

    Attributes:
        pairs: collates the pairs.
        limit: number of tokens to which a prompt with another completion is cut; None for no limit.
    """

    pairs: PairCollator
    limit: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates rows; see :class:`PairCollator`."""
        return self.pairs(self._paired(rows))

    def across(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Pairs rows anew as if several batches were one: the first row of a batch with the last of the one before.

        Args:
            batches: batches of collated rows.
        """
        rows = self._paired([row for batch in batches for row in _rows_of(batch)])
        found, first = [], 0
        for batch in batches:
            labels = batch["labels"]
            new = self.pairs(rows[first : first + len(labels)])
            found.append({**batch, **{name: values.to(labels.device) for name, values in new.items()}})
            first += len(labels)
        return found

    def _paired(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        starts = [_completion_start(row["labels"]) for row in rows]
        both = []
        for place, row in enumerate(rows):
            other, begin = rows[place - 1], starts[place - 1]
            mixed = {
                f"{REJECTED}{name}": [*row[name][: starts[place]], *other[name][begin:]][: self.limit]
                for name in _COLUMNS
            }
            both.append({**row, **mixed})
        return both


def _rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, list[int]]]:
    """The rows of a batch, without padding and without their other completions."""
    columns = {name: batch[name].cpu() for name in (*_COLUMNS, "attention_mask")}
    return [
        {name: columns[name][place][mask.bool()].tolist() for name in _COLUMNS}
        for place, mask in enumerate(columns["attention_mask"])
    ]


def _completion_start(labels: Sequence[int]) -> int:
    """The place of the first label."""
    return next((place for place, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))


def stacked(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sequences of a batch below each other: first those with the chosen, then those with the rejected completions.

    Args:
        batch: a batch from a :class:`PairCollator`.
    """
    names = [name for name in batch if not name.startswith(REJECTED)]
    return {name: torch.cat([batch[name], batch.get(f"{REJECTED}{name}", batch[name])]) for name in names}
