"""The lengths of rows, and a sampling order in which the rows of a batch have about the same length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler, Subset

from nbpeft.names import REJECTED
from nbpeft.training.data.tokenized import TokenizedRows

_READ_THROUGH = 10_000
"""The greatest number of rows to read for their lengths from a dataset of unknown type, where reading may be slow."""
_BLUR = 0.1
"""The share of its length by which a row is randomly counted as longer or shorter before sorting, so that rows of about
the same length are grouped differently in each epoch."""


def lengths_of(rows: Any) -> list[int] | None:
    """The number of tokens of each row; None if it is unknown or could take long to find out.

    Args:
        rows: the result of ``prepare_data``.
    """
    if isinstance(rows, Subset):
        inside = lengths_of(rows.dataset)
        return None if inside is None else [inside[index] for index in rows.indices]
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return None
    if hasattr(rows, "column_names"):
        if "input_ids" not in rows.column_names:
            return None
        names = [name for name in ("input_ids", "attention_mask") if name in rows.column_names]
        batches = rows.with_format(None).select_columns(names).iter(1000)
        return [_length(dict(zip(names, row, strict=True))) for batch in batches for row in _rows_of(batch, names)]
    if not isinstance(rows, TokenizedRows) and len(rows) > _READ_THROUGH:
        return None
    lengths = []
    for index in range(len(rows)):
        row = rows[index]
        if not isinstance(row, Mapping) or "input_ids" not in row:
            return None
        lengths.append(_length(row))
    return lengths


class GroupedByLength(Sampler[int]):
    """Samples all rows once, in a random order in which the rows of a batch have about the same length.

    The batch with the longest row comes first, so that a training that runs out of memory does so at once.

    Args:
        lengths: number of tokens of each row.
        size: number of rows in a batch, of all processes together.
        seed: seed of the order.
        epoch: returns the number of completed epochs, which changes the order too.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._size, self._seed, self._epoch = lengths, size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        drawn = torch.randperm(len(self._lengths), generator=generator).tolist()
        whole = len(drawn) - len(drawn) % self._size
        rest = drawn[
            whole:
        ]  # taken before sorting: if the last batch is dropped, rows of no particular length are lost
        blur = 1 + _BLUR * (2 * torch.rand(whole, generator=generator) - 1)
        keys = [-self._lengths[row] * factor for row, factor in zip(drawn[:whole], blur.tolist(), strict=True)]
        order = [row for _, row in sorted(zip(keys, drawn[:whole], strict=True))]
        batches = [order[start : start + self._size] for start in range(0, whole, self._size)]
        shuffled = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        if shuffled:
            longest = max(range(len(shuffled)), key=lambda index: max(self._lengths[row] for row in shuffled[index]))
            shuffled.insert(0, shuffled.pop(longest))
        yield from (row for batch in (*shuffled, rest) for row in batch)


def _rows_of(batch: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(batch[name] for name in names), strict=True)


def _length(row: Mapping[str, Any]) -> int:
    mask = row.get("attention_mask")
    other = len(row.get(f"{REJECTED}input_ids", ()))
    return max(len(row["input_ids"]) if mask is None else int(sum(map(bool, mask))), other)
