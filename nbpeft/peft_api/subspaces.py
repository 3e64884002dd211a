"""``peft.tuners.osf.utils``: splitting a weight, and projecting gradients away from its dominant directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.methods.projections.osf import projection, taken_apart


def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """Splits the singular value decomposition of a weight into two parts.

    Args:
        weight: (out, in), floating-point.
        top_k: number of largest singular values in the first part, limited by their total number.

    Returns:
        ``U_high``, ``S_high``, ``V_high``: the first part, and ``rank_high``, its size; ``U_low``, ``S_low`` and
        ``V_low``: the rest, as parameters. U is (out, k), S (k,), V (k, in), in the weight's dtype.
    """
    left, values, right = taken_apart(weight, weight.dtype)
    rank = min(top_k, len(values))
    parts = {"U": (left[:, :rank], left[:, rank:]), "S": values.tensor_split([rank]), "V": right.tensor_split([rank])}
    high = {f"{name}_high": part.contiguous() for name, (part, _) in parts.items()}
    low = {f"{name}_low": nn.Parameter(part.contiguous()) for name, (_, part) in parts.items()}
    return {**high, **low, "rank_high": rank}


@torch.no_grad()
def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """Removes the directions of the first part from the gradients of ``U_low`` and ``V_low``, in place.

    Args:
        svd_dict: result of ``decompose_weight_matrix``.
    """
    left, right = svd_dict["U_low"].grad, svd_dict["V_low"].grad
    if left is not None:
        left.copy_(projection(left, svd_dict["U_high"], False))
    if right is not None:
        right.copy_(projection(right.T, svd_dict["V_high"].T, False).T)
