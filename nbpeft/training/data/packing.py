"""Several rows in one sequence: what padding would cost is learned from instead.

| row 4 | row 0        | row 7 |        one sequence of at most `limit` tokens
  0 1 2   0 1 2 3 4 5 6  0 1 2          position_ids: each row begins at 0, and attention ends there
  -   +   -  +  +  + + + -  +           the first token of a row is predicted from no other row
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
    """Puts rows into sequences by best fit, the longest rows first: each into the fullest sequence that takes it.

    Args:
        lengths: tokens of each row.
        limit: tokens of a sequence; a longer row gets one of its own.

    Returns:
        The numbers of the rows of each sequence. Equal lengths give equal sequences.
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
        if left > 0:
            if left not in by_space:
                by_space[left] = []
                bisect.insort(spaces, left)
            by_space[left].append(pack)
    return packs


class PackedRows(Dataset[dict[str, Any]]):
    """Rows, several to a sequence.

    Args:
        rows: with ``input_ids``, and ``labels`` or ``attention_mask`` where they differ from the ids.
        limit: tokens of a sequence.

    Attributes:
        limit: of a sequence.
        row_count: of all sequences.
        token_count: of all rows.
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
        """One row as a sequence of its own, without tokens that its mask leaves out."""
        row = self._complete(dict(self._rows[number]))
        parts = zip(row["input_ids"], row["labels"], row["attention_mask"], strict=True)
        seen = [(int(token), int(label)) for token, label, mask in parts if mask]
        labels = [label if place else IGNORED_LABEL for place, (_, label) in enumerate(seen)]
        weights = zip(row.get(LOSS_WEIGHTS, ()), row["attention_mask"], strict=False)
        weighted = {LOSS_WEIGHTS: [float(weight) for weight, mask in weights if mask]} if LOSS_WEIGHTS in row else {}
        ids = [token for token, _ in seen]
        return {"input_ids": ids, "labels": labels, "position_ids": list(range(len(seen))), **weighted}

    def rows_of(self, index: int) -> list[int]:
        """The numbers of the rows in a sequence."""
        return list(self._packs[index])

    def __str__(self) -> str:
        full = self.token_count / (len(self) * self.limit)
        return f"{count(self.row_count)} rows packed in {count(len(self))} sequences of {count(self.limit)} tokens" + (
            f" ({full:.0%} full)" if full <= 1 else ""
        )


@dataclass
class PackedCollator:
    """Sequences of rows become batches; rows that are not packed, such as those to evaluate on, are padded as ever.

    There is no ``attention_mask``: models of transformers make one from ``position_ids`` that begin again, and padding,
    whose positions are all 0, sees itself alone.

    Attributes:
        plain: for all other rows; its padding token is used here too.
        flat: whether a batch is one long sequence, with its borders beside it, for attention of variable length
            (``cu_seq_lens_q`` and the like), which needs neither mask nor padding.
    """

    plain: Collator
    flat: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Sequences as one batch of (batch, longest), or (1, all tokens) where it is flat."""
        if not all("position_ids" in row for row in rows):
            return dict(self.plain(rows))
        batch: dict[str, Any] = dict(self.plain([joined(rows)] if self.flat else rows))
        del batch["attention_mask"]
        return batch | _borders(batch["position_ids"]) if self.flat else batch


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows one behind the other, as one."""
    rows = all_weighted([dict(row) for row in rows])
    return {key: [value for row in rows for value in row[key]] for key in rows[0]}


def _borders(positions: Tensor) -> dict[str, Any]:
    """What flash attention wants to know of (1, tokens) positions: where rows begin, and the longest of them."""
    starts = torch.cat([positions[0].eq(0).nonzero()[:, 0], torch.tensor([positions.shape[1]])]).to(torch.int32)
    longest = int(starts.diff().max())
    ends = {f"cu_seq_lens_{side}": starts for side in "qk"}
    return {**ends, **{f"max_length_{side}": longest for side in "qk"}}
