"""Elementwise rules for tensors of one shape: pruning, sign election, weighted sums.

TIES is https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from nbpeft.engine.methods.lora.combining.recipe import Recipe


def merge(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """Merges tensors of one shape by the recipe's elementwise rule.

    Random rules draw one mask for each tensor, in order, from the generator of the tensor's device.

    Args:
        tensors: tensors of one shape.
        weights: one number for each tensor.
        recipe: gives the rule, the density and the sign election.
    """
    rule = recipe.rule
    if recipe.prunes:
        assert recipe.density is not None
        tensors = [_prune(tensor, recipe.density, random=recipe.draws) for tensor in tensors]
    if rule in ("ties", "dare_ties"):
        return _elected_mean(tensors, weights, recipe.majority_sign_method)
    return _weighted_sum(tensors, weights)


def _prune(tensor: Tensor, density: float, *, random: bool) -> Tensor:
    if density >= 1:
        warnings.warn(f"density {density} keeps every entry: nothing is pruned", UserWarning, stacklevel=2)
        return tensor
    if random:
        kept = torch.bernoulli(torch.full_like(tensor, density)).mul_(tensor)
        return kept.div_(density)
    flat = tensor.abs().reshape(-1)
    mask = torch.zeros_like(flat)
    mask.index_fill_(0, torch.topk(flat, k=int(density * flat.numel()), sorted=False).indices, 1)
    return tensor * mask.reshape(tensor.shape)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def _elected_mean(tensors: Sequence[Tensor], weights: Sequence[float], method: str) -> Tensor:
    """Elementwise mean of the weighted tensors whose sign agrees with the majority's."""
    ballots = tensors if method == "total" else [tensor.sign() for tensor in tensors]
    positive = _weighted_sum(ballots, [1.0] * len(ballots)) >= 0
    total, count = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = torch.where(positive, tensor > 0, tensor < 0)
        total += (tensor * weight) * agrees
        count += agrees
    return total / count.clamp_(min=1.0)
