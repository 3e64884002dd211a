"""Decompositions that compute only the first directions of a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SEED = 0
"""Seed of the randomized SVD: loading an adapter has to recompute the same initial component."""
_LARGEST_EXACT = 2048
"""Columns up to which a Gram matrix is formed in float64."""


def randomized_svd(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.svd_lowrank``, but with the same random draws on every device, because the result depends on them.

    Reference: Halko et al. 2009, arXiv:0909.4061.
    """
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randn(weight.shape[1], rank, generator=generator, dtype=weight.dtype).to(weight.device)
    basis = torch.linalg.qr(weight @ draws)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(weight.T @ basis)[0]
        basis = torch.linalg.qr(weight @ basis)[0]
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, values, right


def nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), of equal norm, whose product is closest to a matrix (out, in).

    Computed from the eigenvectors of its smaller Gram matrix, at a fraction of the cost of an SVD.
    """
    transposed = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if transposed else matrix
    gram = tall.T.double() @ tall.double() if tall.shape[1] <= _LARGEST_EXACT else tall.T @ tall
    basis = torch.linalg.eigh(gram)[1][:, -rank:].flip(1).to(tall.dtype)
    image = tall @ basis
    root = image.norm(dim=0).sqrt().clamp_min(math.sqrt(torch.finfo(torch.float32).tiny))
    left, right = image / root, (basis * root).T
    return (left.T, right.T) if transposed else (right, left)
