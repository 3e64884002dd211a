"""Best rank-k factors of a weighted sum of low-rank products, and their approximation error."""

from __future__ import annotations

import torch
from torch import Tensor

from nbpeft.engine.contract.combination import Loss
from nbpeft.engine.methods.lora.combining.recipe import Recipe
from nbpeft.errors import ConfigError


def measure_loss(true_B: Tensor, true_A: Tensor, kept_B: Tensor, kept_A: Tensor) -> Loss:
    """The loss of truncated factors, from Gram matrices: a delta is built only if it is smaller than its factors.

    Args:
        true_B: (groups, out / groups, R / groups), as ``factors.stack`` returns it.
        true_A: (groups, R / groups, in * kernel).
        kept_B: B of the truncated factors, in the same layout.
        kept_A: A of the truncated factors.
    """
    # Relative errors below 3e-4 are lost to rounding in float32 Gram products; in float64 those below 1e-8.
    wide = torch.float32 if true_B.device.type == "mps" else torch.float64
    true_B, true_A, kept_B, kept_A = (tensor.to(wide) for tensor in (true_B, true_A, kept_B, kept_A))
    if not _thin(true_B, true_A):
        true_B, true_A = true_B @ true_A, torch.eye(true_A.shape[-1], dtype=wide, device=true_A.device)
    true, kept = _inner(true_B, true_A, true_B, true_A), _inner(kept_B, kept_A, kept_B, kept_A)
    overlap = _inner(true_B, true_A, kept_B, kept_A)
    return Loss(true, kept, max(true - 2 * overlap + kept, 0.0), overlap)


def _thin(wide_B: Tensor, wide_A: Tensor) -> bool:
    """Whether the factors are smaller than their product, which they are not for many adapters."""
    return wide_A.shape[-2] < min(wide_B.shape[-2], wide_A.shape[-1])


def _inner(left_B: Tensor, left_A: Tensor, right_B: Tensor, right_A: Tensor) -> float:
    return float(((left_B.mT @ right_B) * (left_A @ right_A.mT)).sum())


def truncate_factors(wide_B: Tensor, wide_A: Tensor, rank: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` factors of B A, from QR of the factors and SVD of the small core.

    Args:
        wide_B: (groups, out, R).
        wide_A: (groups, R, in).
        rank: rank to keep in each group.
        recipe: settings of the SVD and its clamp.

    Returns:
        B (groups, out, k), singular values included, and A (groups, k, in) with orthonormal rows,
        k = min(rank, R, out, in).
    """
    if not _thin(wide_B, wide_A):
        return truncate_delta(wide_B @ wide_A, rank, recipe)
    left, left_core = torch.linalg.qr(wide_B)
    right, right_core = torch.linalg.qr(wide_A.mT)
    rotate_left, values, rotate_right = _svd(left_core @ right_core.mT, recipe, full=False)
    kept_B = left @ (rotate_left[..., :rank] * values[..., None, :rank])
    kept_A = rotate_right[..., :rank, :] @ right.mT
    return _clamped(kept_B, kept_A, recipe.svd_clamp)


def truncate_delta(delta: Tensor, rank: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` factors of full matrices (groups, out, in).

    Args:
        delta: (groups, out, in).
        rank: rank to keep in each group.
        recipe: settings of the SVD and its clamp.

    Returns:
        B and A, as of ``truncate_factors``.
    """
    # ``full_matrices`` can flip signs of singular vectors, which affects the quantile of a clamp.
    full = recipe.svd_full_matrices and recipe.svd_clamp is not None
    left, values, right = _svd(delta, recipe, full=full)
    return _clamped(left[..., :rank] * values[..., None, :rank], right[..., :rank, :], recipe.svd_clamp)


def _svd(matrix: Tensor, recipe: Recipe, *, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    driver = recipe.svd_driver
    if driver is not None and matrix.device.type != "cuda":
        raise ConfigError(
            f"svd_driver={driver!r} works on CUDA only; the adapters lie on {matrix.device.type}", svd_driver=driver
        )
    return torch.linalg.svd(matrix, full_matrices=full, driver=driver)


def _clamped(kept_B: Tensor, kept_A: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    if clamp is None:
        return kept_B, kept_A
    bound = torch.quantile(torch.cat([kept_B.flatten(), kept_A.flatten()]), clamp)
    return kept_B.clamp(-bound, bound), kept_A.clamp(-bound, bound)
