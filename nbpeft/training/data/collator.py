"""Collates rows into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.errors import TrainingError
from nbpeft.names import IGNORED_LABEL, LOSS_WEIGHTS
from nbpeft.training.data.reading import LABELS
from nbpeft.training.data.row import listed


@dataclass
class Collator:
    """Pads rows on the right into batches of tensors.

    ``labels`` are padded with -100, ``input_ids`` with the padding token, everything else with 0;
    single numbers become a (batch,) tensor, and ``label`` is renamed to ``labels``. If some rows have
    ``loss_weights``, the others get weights of 1.

    Attributes:
        pad_token_id: The token id with which ``input_ids`` are padded.
        copy_labels: Whether rows without labels get their ``input_ids`` as labels.
        pad_to_multiple_of: The number of tokens to a multiple of which lengths are rounded up.
    """

    pad_token_id: int = 0
    copy_labels: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates rows into one batch; sequences become tensors of shape (batch, longest).

        Raises:
            TrainingError: some rows have a column that others lack.
        """
        complete = all_weighted([self.complete(_renamed(row)) for row in rows])
        batch = {}
        for key in dict.fromkeys(key for row in complete for key in row):
            if any(key not in row for row in complete):
                raise TrainingError(f"some rows of a batch have {key!r} and others do not: give it to all, or to none")
            values = [torch.as_tensor(row[key]) for row in complete]
            if values[0].ndim == 0:
                batch[key] = torch.stack(values)
                continue
            if values[0].ndim > 1:
                _check_sizes(key, values)
            length = max(len(value) for value in values)
            if self.pad_to_multiple_of and values[0].ndim == 1:
                length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
            filler = {"input_ids": self.pad_token_id, "labels": IGNORED_LABEL}.get(key, 0)
            batch[key] = torch.stack([_padded(value, length, filler) for value in values])
        return batch

    def complete(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds a missing attention mask and missing labels to a tokenized row; modifies and returns it."""
        if "input_ids" not in row:
            return row
        if "attention_mask" not in row:
            row["attention_mask"] = [1] * len(row["input_ids"])
        if self.copy_labels and "labels" not in row:
            mask = zip(row["input_ids"], row["attention_mask"], strict=True)
            row["labels"] = [int(token) if seen else IGNORED_LABEL for token, seen in mask]
        return row


def all_weighted(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Rows with a weight for each label: if any row has weights, rows without them get weights of 1."""
    if not any(LOSS_WEIGHTS in row for row in rows):
        return rows
    return [row if LOSS_WEIGHTS in row else {**row, LOSS_WEIGHTS: _ones(row["labels"])} for row in rows]


def _ones(labels: Any) -> Any:
    return torch.ones_like(torch.as_tensor(labels), dtype=torch.float32).tolist()


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its labels renamed to ``labels``, the name that models take."""
    label_column = next((name for name in LABELS if name in row), "labels")
    return {
        "labels" if key == label_column else key: value
        for key, value in row.items()
        if key == label_column or key not in LABELS
    }


def _check_sizes(key: str, values: Sequence[Tensor]) -> None:
    """Refuses values that are not sequences, such as pictures, and differ in size: they are not padded."""
    shapes = {tuple(value.shape) for value in values}
    apart = {shape if len(shape) > 2 else shape[1:] for shape in shapes}
    if len(apart) > 1:
        raise TrainingError(
            f"rows of a batch have {key!r} of the shapes {listed(shapes)}; give them one size, or data_collator=…, "
            "a function from rows to a batch"
        )


def _padded(value: Tensor, length: int, filler: int) -> Tensor:
    if len(value) == length:
        return value
    padding = value.new_full((length - len(value), *value.shape[1:]), filler)
    return torch.cat([value, padding])
