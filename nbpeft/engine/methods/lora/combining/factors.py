"""One adapter's factors on one layer, as matrices for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One adapter's delta on one layer: ``scaling * B A``.

    Attributes:
        lora_A: (r, in), (r, V) of an embedding, or (r, in, *kernel).
        lora_B: (out, r), or (out, r / groups, 1, …) of a convolution.
        scaling: factor of the product.
        groups: groups of a convolution; each has its own r / groups rows of A.
        bias: (out,) bias of B, or None.
        row_scale: (out,) factor on the rows of the adapted weight, of DoRA: magnitude over
            the norm of ``W + scaling B A``; None means 1.
        transposed: whether the layer stores its weight as (in, out): embeddings and
            transformers' ``Conv1D``. Pruning of full deltas goes through them in that order.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    groups: int = 1
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        """The rank: rows of A."""
        return self.lora_A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of A."""
        return self.lora_A.dtype

    def widened(self) -> Factors:
        """A detached copy in at least float32, for computing."""
        if self.lora_A.dtype == torch.float64:
            return self._mapped(lambda tensor: tensor.detach())
        return self._mapped(lambda tensor: tensor.detach().float())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Factors:
        bias = None if self.bias is None else change(self.bias)
        row_scale = None if self.row_scale is None else change(self.row_scale)
        return replace(self, lora_A=change(self.lora_A), lora_B=change(self.lora_B), bias=bias, row_scale=row_scale)

    def delta(self) -> Tensor:
        """``scaling * B A``: (out, in, *kernel), (in, out) if transposed, or by groups.

        Grouped it is (groups, out / groups, in * kernel).

        A convolution's product is computed by a convolution, as in PEFT: which entries survive
        pruning depends on the last bit, and the order of random draws on the memory layout.
        """
        if self.groups > 1:
            return torch.bmm(matrix_B(self.lora_B, self.groups), matrix_A(self.lora_A, self.groups)) * self.scaling
        kernel = self.lora_A.shape[2:]
        if not kernel or tuple(kernel) == (1, 1):
            product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
            product = product.T if self.transposed else product.view(*product.shape, *kernel)
            return product * self.scaling
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        return convolve(self.lora_A.transpose(0, 1), self.lora_B).transpose(0, 1) * self.scaling

    def matrices(self, delta: Tensor) -> Tensor:
        """A tensor shaped like ``delta()`` as (groups, out / groups, in * kernel)."""
        if self.groups > 1:
            return delta
        return delta.T[None] if self.transposed else delta.flatten(1)[None]


def matrix_A(lora_A: Tensor, groups: int) -> Tensor:
    """A as (groups, r / groups, in * kernel)."""
    return lora_A.reshape(groups, lora_A.shape[0] // groups, -1)


def matrix_B(lora_B: Tensor, groups: int) -> Tensor:
    """B as (groups, out / groups, r / groups)."""
    return lora_B.reshape(groups, lora_B.shape[0] // groups, lora_B.shape[1])


def stack(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors of the weighted sum of the deltas, as batched matrices.

    Returns:
        B (groups, out / groups, R / groups) and A (groups, R / groups, in * kernel), R the sum of the
        ranks. Weights and scalings are included in B, so B A is the sum.
    """
    groups = parts[0].groups
    wide_B = [
        matrix_B(part.lora_B, groups) * (weight * part.scaling) for part, weight in zip(parts, weights, strict=True)
    ]
    return torch.cat(wide_B, dim=2), torch.cat([matrix_A(part.lora_A, groups) for part in parts], dim=1)


def unstack(wide_B: Tensor, wide_A: Tensor, rank: int, like: Factors) -> tuple[Tensor, Tensor]:
    """Batched matrices as (A, B) in the layer's own shapes, padded with zeros to ``rank``."""
    groups = like.groups
    missing = rank // groups - wide_B.shape[2]
    if missing > 0:
        wide_B = F.pad(wide_B, (0, missing))
        wide_A = F.pad(wide_A, (0, 0, 0, missing))
    lora_A = wide_A.reshape(rank, *like.lora_A.shape[1:])
    lora_B = wide_B.reshape(like.lora_B.shape[0], rank // groups, *like.lora_B.shape[2:])
    return lora_A.contiguous(), lora_B.contiguous()
