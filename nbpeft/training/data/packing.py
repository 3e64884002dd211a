"""Packs several rows into one sequence, so that no tokens are spent on padding.

| row 4 | row 0        | row 7 |        one sequence of at most `limit` tokens
  0 1 2   0 1 2 3 4 5 6  0 1 2          position_ids: each row begins at 0, and no token attends to another row
  -   +   -  +  +  + + + -  +           labels: the first token of a row has none, as it follows another row
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nbpeft.display.numbers import count
from nbpeft.names import IGNORED_LABEL, LOSS_WEIGHTS
from nbpeft.training.data.collator import Collator, all_weighted
from nbpeft.training.data.lengths import lengths_of


def best_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Packs rows by best fit, the longest rows first: each into the fullest sequence with enough space.

    Args:
        lengths: number of tokens of each row.
        limit: number of tokens of a sequence; a longer row gets a sequence of its own.

    Returns:
        The indices of the rows of each sequence. The result depends only on the lengths.
    """
    packs: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # keys of by_space, ascending
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(spaces, lengths[row])
        if place == len(spaces):
            pack, space = len(packs), limit
            packs.append([])
        else:
            space = spaces[place]
            pack = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        packs[pack].append(row)
        left = space - lengths[row]
        if left not in by_space:
            by_space[left] = []
            bisect.insort(spaces, left)
        by_space[left].append(pack)
    return packs


class PackedRows(Dataset[dict[str, Any]]):
    """A dataset of sequences with several rows each.

    Args:
        rows: rows with ``input_ids``, and optionally ``labels`` and ``attention_mask``.
        limit: greatest number of tokens of a sequence.

    Attributes:
        limit: greatest number of tokens of a sequence.
        row_count: number of rows in all sequences.
        token_count: number of tokens of all rows.
    """

    def __init__(self, rows: Any, limit: int) -> None:
        lengths = lengths_of(rows)
        assert lengths is not None
        self._rows = rows
        self._packs = best_fit(lengths, limit)
        self._complete = Collator(copy_labels=True).complete
        self.limit, self.row_count, self.token_count = limit, len(lengths), sum(lengths)

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return joined([self.row(number) for number in self._packs[index]])

    def row(self, number: int) -> dict[str, Any]:
        """One row as a sequence of its own, without the tokens that its attention mask hides."""
        row = self._complete(dict(self._rows[number]))
        parts = zip(row["input_ids"], row["labels"], row["attention_mask"], strict=True)
        seen = [(int(token), int(label)) for token, label, mask in parts if mask]
        labels = [label if place else IGNORED_LABEL for place, (_, label) in enumerate(seen)]
        weights = zip(row.get(LOSS_WEIGHTS, ()), row["attention_mask"], strict=False)
        weighted = {LOSS_WEIGHTS: [float(weight) for weight, mask in weights if mask]} if LOSS_WEIGHTS in row else {}
        ids = [token for token, _ in seen]
        return {"input_ids": ids, "labels": labels, "position_ids": list(range(len(seen))), **weighted}

    def rows_of(self, index: int) -> list[int]:
        """The indices of the rows in a sequence."""
        return list(self._packs[index])

    def __str__(self) -> str:
        full = self.token_count / (len(self) * self.limit)
        return f"{count(self.row_count)} rows packed in {count(len(self))} sequences of {count(self.limit)} tokens" + (
            f" ({full:.0%} full)" if full <= 1 else ""
        )


@dataclass
class PackedCollator:
    """Collates packed sequences into batches; other rows, such as evaluation rows, are padded as usual.

    A packed batch has no ``attention_mask``: without one, models of transformers derive a block-diagonal mask from
    ``position_ids`` that restart at 0. Each padding token has position 0 and so attends only to itself.

    Attributes:
        plain: the collator of rows that are not packed; its padding token is used here too.
        flat: whether a batch is one long sequence together with the borders of its rows, for variable-length attention
            (``cu_seq_lens_q`` etc.), which needs neither mask nor padding.
    """

    plain: Collator
    flat: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates sequences into one batch of shape (batch, longest), or (1, all tokens) if it is flat."""
        if not all("position_ids" in row for row in rows):
            return dict(self.plain(rows))
        batch: dict[str, Any] = dict(self.plain([joined(rows)] if self.flat else rows))
        del batch["attention_mask"]
        return batch | _borders(batch["position_ids"]) if self.flat else batch


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Concatenates rows into one."""
    rows = all_weighted([dict(row) for row in rows])
    return {key: [value for row in rows for value in row[key]] for key in rows[0]}


def _borders(positions: Tensor) -> dict[str, Any]:
    """The arguments of FlashAttention for positions of shape (1, tokens): the borders and the longest of the rows."""
    starts = torch.cat([positions[0].eq(0).nonzero()[:, 0], torch.tensor([positions.shape[1]])]).to(torch.int32)
    longest = int(starts.diff().max())
    ends = {f"cu_seq_lens_{side}": starts for side in "qk"}
    return {**ends, **{f"max_length_{side}": longest for side in "qk"}}
