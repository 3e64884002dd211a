"""``peft.utils.merge_utils``: combines tensors of equal shape by the rules for combining adapters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nbpeft.engine.methods.lora.combining import Recipe
from nbpeft.engine.methods.lora.combining.sparsify import merge


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Returns the weighted sum.

    Args:
        task_tensors: tensors of one shape.
        weights: (tensors,), one factor for each.
    """
    return merge(task_tensors, weights.tolist(), Recipe("linear"))


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Returns the weighted sum of the largest entries of each tensor.

    Args:
        task_tensors: tensors of one shape.
        weights: (tensors,), one factor for each.
        density: share of the entries that are kept, in [0, 1].
    """
    return merge(task_tensors, weights.tolist(), Recipe("magnitude_prune", density=density))


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """TIES (https://arxiv.org/abs/2306.01708): the mean of the largest entries that have the sign of the majority.

    Args:
        task_tensors: tensors of one shape.
        weights: (tensors,), one factor for each.
        density: share of the entries that are kept, in [0, 1].
        majority_sign_method: "total" weighs signs by magnitude, "frequency" counts them.
    """
    recipe = Recipe("ties", density=density, majority_sign_method=majority_sign_method)
    return merge(task_tensors, weights.tolist(), recipe)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE (https://arxiv.org/abs/2311.03099): the weighted sum of randomly selected, rescaled entries.

    Args:
        task_tensors: tensors of one shape.
        weights: (tensors,), one factor for each.
        density: share of the entries that are kept, in (0, 1].
    """
    return merge(task_tensors, weights.tolist(), Recipe("dare_linear", density=density))


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """DARE with the sign election of TIES.

    Args:
        task_tensors: tensors of one shape.
        weights: (tensors,), one factor for each.
        density: share of the entries that are kept, in (0, 1].
        majority_sign_method: "total" weighs signs by magnitude, "frequency" counts them.
    """
    recipe = Recipe("dare_ties", density=density, majority_sign_method=majority_sign_method)
    return merge(task_tensors, weights.tolist(), recipe)
