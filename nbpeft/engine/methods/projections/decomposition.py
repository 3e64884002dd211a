"""Main directions of a matrix and of some of its rows, and clusters of its rows: the numerics of AdaMSS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_MOST_ITERATIONS = 10
_SEED = 123456789
"""Of the rows that k-means starts from: PEFT's."""


def main_directions(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The left, (out, r), and right singular vectors, (r, in), of the rank-r part of a matrix, approximately.

    The randomized SVD of Halko et al. (2011, arXiv:0909.4061) with two iterations, as ``torch.svd_lowrank`` computes
    it, but drawn on the CPU, so that each device finds the same.

    Args:
        matrix: (out, in), float32.
        rank: r; at most the smaller size.
        seed: seed of the draws.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    drawn = torch.randn(tall.shape[1], rank, generator=torch.Generator().manual_seed(seed)).to(matrix)
    basis = _basis(lambda x: tall @ x, lambda x: tall.T @ x, drawn)
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    left, right = basis @ left, right.T
    left, right = (left, right) if tall is matrix else (right, left)
    return left.contiguous(), right.T.contiguous()


def _basis(product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], drawn: Tensor) -> Tensor:
    """An orthonormal basis, (n, r), close to a matrix' main left singular directions, from random numbers (m, r)."""
    basis: Tensor = torch.linalg.qr(product(drawn)).Q
    for _ in range(2):
        basis = torch.linalg.qr(product(torch.linalg.qr(transposed(basis)).Q)).Q
    return basis


def row_directions(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal directions, (rank, r), near the main ones of some rows, (n, r), as PEFT draws them."""

    def gram(x: Tensor) -> Tensor:
        return rows @ (rows.T @ x)

    basis = _basis(gram, gram, torch.randn(len(rows), rank, device=rows.device, dtype=rows.dtype))
    left = torch.linalg.svd(gram(basis).T, full_matrices=False)[0]
    return torch.linalg.qr(rows.T @ (basis @ left)).Q.T


def row_clusters(rows: Tensor, count: int) -> Tensor:
    """Number of the cluster of each row, (n,), on the CPU: Lloyd's k-means from rows drawn with one seed.

    Clusters of no row are left out of the numbers.

    Args:
        rows: (n, features).
        count: number of clusters; at most n.
    """
    points = rows.detach().to("cpu", torch.float32)
    tolerance = 1e-4 * points.var(0, unbiased=False).mean()
    points = points - points.mean(0)
    chances = np.full(len(points), 1 / np.float32(len(points)), dtype=np.float32)
    drawn = np.random.RandomState(_SEED).choice(len(points), size=count, replace=False, p=chances / chances.sum())
    centers, numbers = points[torch.as_tensor(drawn)], torch.full((len(points),), -1)
    for _ in range(_MOST_ITERATIONS):
        before, numbers = numbers, _nearest(points, centers)
        moved = _centers(points, numbers, centers)
        shift, centers = (moved - centers).square().sum(), moved
        if torch.equal(before, numbers):
            break
        if shift <= tolerance:
            numbers = _nearest(points, centers)
            break
    else:
        numbers = _nearest(points, centers)
    used: Tensor = numbers.bincount(minlength=count) > 0
    return (used.cumsum(0) - 1)[numbers]


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    """Number of the center that each point is nearest to."""
    return (centers.square().sum(1) - 2 * points @ centers.T).argmin(1)


def _centers(points: Tensor, numbers: Tensor, before: Tensor) -> Tensor:
    """Mean of the points of each cluster; empty clusters move to the points farthest from their centers."""
    sums, counts = torch.zeros_like(before).index_add_(0, numbers, points), numbers.bincount(minlength=len(before))
    empty = (counts == 0).nonzero().flatten().tolist()
    distances = (points - before[numbers]).square().sum(1)
    if empty and float(distances.max()) > 0:
        for k, place in zip(empty, distances.argsort(descending=True).tolist(), strict=False):
            sums[numbers[place]] -= points[place]
            counts[numbers[place]] -= 1
            sums[k], counts[k] = points[place], 1
    largest = int(counts.argmax())
    means = sums / counts.clamp_min(1)[:, None]
    return torch.where((counts > 0)[:, None], means, means[largest])
