"""One batch whose rows use different low-rank adapters.

On an accelerator a kernel launch costs more than the arithmetic, so the factors are stacked once
and the batch is two batched products, whatever the number of adapters. On a CPU stacking costs more
than it saves (allocating memory is slow there), so each adapter's rows are multiplied by its own
factors: nothing is copied, and an adapter of many rows is read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from nbpeft.engine.kernels.numerics import compute_dtype

Factors = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and their scaling."""


@torch.no_grad()
def factor_rows(factors: Sequence[Factors | None], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Makes a function that computes each row's product with the factors of its own adapter.

    Args:
        factors: each adapter's factors, at least one; None for adapters that the layer lacks.
        device: device of the batch.

    Returns:
        A function of the input (batch, …, in) and an index, int64 (batch,), into ``factors``, -1 for
        no adapter, the same tensor object in every call of a generation. It returns ``scaling * B A x``,
        (batch, …, out), in the factors' or the autocast dtype.
    """
    served = FactorGroups(factors) if device.type == "cpu" else FactorBank(factors)
    return served.delta


class FactorGroups:
    """The factors of several adapters, not copied, and the rows that use each of them.

    Args:
        factors: each adapter's factors; None for adapters that the layer lacks.
    """

    def __init__(self, factors: Sequence[Factors | None]) -> None:
        self._factors = factors
        self._out_features = next(entry for entry in factors if entry is not None)[1].shape[0]
        self._groups: tuple[Tensor, Tensor | None, list[tuple[int, int]]] | None = None

    def delta(self, x: Tensor, index: Tensor) -> Tensor:
        """See ``factor_rows``."""
        order, groups = self._grouped(index)
        first = next(entry for entry in self._factors if entry is not None)[0]
        dtype = compute_dtype(x, first)
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).to(dtype)
        tokens = rows.shape[1]
        flat = (rows if order is None else rows[order]).flatten(0, 1)
        pieces = torch.split(flat, [count * tokens for _, count in groups])
        products = [self._product(piece, place) for piece, (place, _) in zip(pieces, groups, strict=True)]
        delta = torch.cat(products).view(x.shape[0], tokens, self._out_features)
        if order is not None:
            delta = torch.empty_like(delta).index_copy(0, order, delta)
        return delta.view(*x.shape[:-1], self._out_features)

    def _product(self, rows: Tensor, place: int) -> Tensor:
        entry = self._factors[place] if place >= 0 else None
        if entry is None:
            return rows.new_zeros(rows.shape[0], self._out_features)
        lora_A, lora_B, scaling = entry
        hidden = (rows @ lora_A.to(rows.dtype).T) * scaling
        return hidden @ lora_B.to(rows.dtype).T

    def _grouped(self, index: Tensor) -> tuple[Tensor | None, list[tuple[int, int]]]:
        """The order that groups rows by adapter (None if they are grouped), and (index, rows) of each adapter."""
        if self._groups is not None and self._groups[0] is index:
            return self._groups[1:]
        places = index.tolist()
        order = sorted(range(len(places)), key=places.__getitem__)
        groups = [(place, len(list(rows))) for place, rows in groupby(places[row] for row in order)]
        runs = [(place, len(list(rows))) for place, rows in groupby(places)]
        together = len(runs) == len(groups)
        moved = None if together else torch.tensor(order, device=index.device)
        groups = runs if together else groups
        self._groups = (index, moved, groups)
        return moved, groups


class FactorBank:
    """The factors of several adapters, stacked, so that a mixed batch is two batched products.

    Ranks are padded with zeros to the largest; an additional last entry of zeros is for rows
    without an adapter.

    Args:
        factors: each adapter's factors; None for adapters that the layer lacks.
    """

    def __init__(self, factors: Sequence[Factors | None]) -> None:
        present = [entry for entry in factors if entry is not None]
        rank = max(lora_A.shape[0] for lora_A, _, _ in present)
        first_A, first_B, _ = present[0]
        count = len(factors) + 1
        self.down = first_A.new_zeros(count, rank, first_A.shape[1])
        self.up = first_B.new_zeros(count, rank, first_B.shape[0])
        for place, entry in enumerate(factors):
            if entry is not None:
                lora_A, lora_B, scaling = entry
                self.down[place, : lora_A.shape[0]] = lora_A
                torch.mul(lora_B.T, scaling, out=self.up[place, : lora_B.shape[1]])
        self._gathered: tuple[Tensor, Tensor, Tensor] | None = None

    def delta(self, x: Tensor, index: Tensor) -> Tensor:
        """See ``factor_rows``."""
        down, up = self._gather(index)
        dtype = compute_dtype(x, down)
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).to(dtype)
        delta = (rows @ down.to(dtype).transpose(1, 2)) @ up.to(dtype)
        return delta.view(*x.shape[:-1], up.shape[-1])

    def _gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Factors for each row; kept for the next call unless they are larger than the bank."""
        if self._gathered is not None and self._gathered[0] is index:
            return self._gathered[1], self._gathered[2]
        places = index.remainder(self.down.shape[0])
        down, up = self.down[places], self.up[places]
        if index.shape[0] <= 2 * self.down.shape[0]:
            self._gathered = (index, down, up)
        return down, up
