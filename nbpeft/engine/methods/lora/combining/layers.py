"""combine(): all layers of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.contract.combination import Loss
from nbpeft.engine.methods.lora.combining.factors import Factors, matrix_A, matrix_B, stack, unstack
from nbpeft.engine.methods.lora.combining.recipe import Recipe
from nbpeft.engine.methods.lora.combining.sparsify import merge
from nbpeft.engine.methods.lora.combining.truncate import measure_loss, truncate_delta, truncate_factors
from nbpeft.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class CombinedLayer:
    """The combination on one layer; its scaling is 1.

    Attributes:
        lora_A, lora_B: factors in the layer's own shapes and the adapters' dtype.
        bias: (out,) bias of B, or None.
        row_scale: (out,) factor on the rows of ``W + B A`` of a combination of DoRA adapters, or None.
        loss: distance from the exact weighted delta.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    row_scale: Tensor | None
    loss: Loss

    @property
    def rank(self) -> int:
        """The rank: rows of A."""
        return self.lora_A.shape[0]


@dataclass(frozen=True)
class CombinedFactors:
    """The result on all layers.

    Attributes:
        layers: path -> combined layer.
        rank: rank of every layer except those in ``ranks_apart``.
        recipe: the combination's settings.
    """

    layers: dict[str, CombinedLayer]
    rank: int
    recipe: Recipe

    @property
    def ranks_apart(self) -> dict[str, int]:
        """Path -> rank of the layers whose rank differs from ``rank``."""
        return {path: layer.rank for path, layer in self.layers.items() if layer.rank != self.rank}

    @property
    def loss(self) -> Loss:
        """The loss summed over all layers."""
        return sum((layer.loss for layer in self.layers.values()), Loss())

    def __str__(self) -> str:
        loss = self.loss
        return (
            f"{self.recipe.combination_type}: {len(self.layers)} layers, rank {self.rank}, "
            f"relative error {loss.relative_error:.2%}, energy kept {loss.energy_kept:.2%}"
        )


@torch.no_grad()
def combine(
    layers: Mapping[str, Mapping[str, Factors]], adapters: Sequence[str], weights: Sequence[float], recipe: Recipe
) -> CombinedFactors:
    """Combines adapters layer by layer.

    Args:
        layers: path -> adapter name -> factors, in the model's order, in which random types draw.
        adapters: names to combine; an adapter without factors on a layer adds nothing there.
        weights: one number for each adapter; negative weights subtract.
        recipe: the combination's settings.

    Returns:
        The combined factors, each with scaling 1, and the approximation error.

    Raises:
        AdapterError: the numbers of weights and adapters differ, no layer has any of the adapters, or a
            tensor is not finite.
        ConfigError: the recipe does not work for these ranks or layers.
    """
    recipe = recipe.for_count(len(adapters))
    members = {path: [name for name in adapters if name in named] for path, named in layers.items()}
    members = {path: names for path, names in members.items() if names}
    if not members:
        raise AdapterError(f"none of the adapters {', '.join(adapters)} has low-rank factors on any layer")
    chosen = _common_rank(layers, adapters, members, recipe)
    weight_pairs = {
        path: [weight for name, weight in zip(adapters, weights, strict=True) if name in layers[path]]
        for path in members
    }
    combined: dict[str, CombinedLayer] = {}
    for path, names in members.items():
        check_interrupt()
        parts = [layers[path][name] for name in names]
        rank = parts[0].rank if recipe.on_factors else chosen
        _check_layer(path, names, parts, rank, recipe)
        combined[path] = _combined_finite(path, names, parts, weight_pairs[path], rank, recipe)
    return CombinedFactors(combined, chosen, recipe)


def _common_rank(
    layers: Mapping[str, Mapping[str, Factors]],
    adapters: Sequence[str],
    members: Mapping[str, list[str]],
    recipe: Recipe,
) -> int:
    """The rank of the result: the same for all layers, except for types that keep each layer's rank."""
    largest = {
        name: max((layers[path][name].rank for path in members if name in layers[path]), default=0) for name in adapters
    }
    ranks = [largest[name] for name in adapters]
    if recipe.combination_type in ("exact", "cat"):
        total = sum(ranks)
        return recipe.svd_rank or total if recipe.combination_type == "exact" else total
    if recipe.on_factors:
        return max(ranks)
    return recipe.svd_rank or max(ranks)


def _check_layer(path: str, names: Sequence[str], parts: Sequence[Factors], rank: int, recipe: Recipe) -> None:
    ranks = [part.rank for part in parts]
    if recipe.on_factors and len(set(ranks)) > 1:
        listed = ", ".join(f"{name} {rank}" for name, rank in zip(names, ranks, strict=True))
        raise ConfigError(
            f"combination_type {recipe.combination_type!r} needs equal ranks, but {path} has {listed}; "
            "use 'exact', 'svd' or 'cat'",
            path=path,
            ranks=dict(zip(names, ranks, strict=True)),
        )
    if rank % parts[0].groups:
        raise ConfigError(
            f"{path} is a convolution with {parts[0].groups} groups and cannot take rank {rank}; "
            f"choose a multiple of {parts[0].groups} as svd_rank",
            path=path,
            rank=rank,
        )


def _combined_finite(
    path: str, names: Sequence[str], parts: Sequence[Factors], weights: Sequence[float], rank: int, recipe: Recipe
) -> CombinedLayer:
    """Combines one layer; raises an error that names the adapter with non-finite numbers if that fails."""
    try:
        layer = _combine_layer(parts, weights, rank, recipe)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        layer = None
    if layer is not None and math.isfinite(layer.loss.true):
        return layer
    broken = [
        name
        for name, part in zip(names, parts, strict=True)
        if not all(
            bool(torch.isfinite(tensor).all())
            for tensor in (part.lora_A, part.lora_B, part.row_scale)
            if tensor is not None
        )
    ]
    whose = f"adapter {broken[0]!r} has" if broken else f"the combination of {', '.join(map(repr, names))} has"
    raise AdapterError(f"{whose} non-finite values at {path}", path=path)


def _combine_layer(parts: Sequence[Factors], weights: Sequence[float], rank: int, recipe: Recipe) -> CombinedLayer:
    dtype, first = parts[0].dtype, parts[0]
    wide = [part.widened() for part in parts]
    exact = recipe.combination_type == "exact" or len(parts) == 1  # a single adapter keeps its DoRA scales
    row_scale = _combined_row_scale(wide, weights) if exact else None
    if row_scale is not None:
        wide = [_with_row_scale(part, row_scale) for part in wide]
    true_B, true_A = stack(wide, weights)
    kept_A, kept_B = _kept(wide, weights, rank, recipe, true_B, true_A)
    loss = measure_loss(true_B, true_A, matrix_B(kept_B, first.groups), matrix_A(kept_A, first.groups))
    bias = _combined_bias(wide, weights)
    return CombinedLayer(
        kept_A.to(dtype),
        kept_B.to(dtype),
        None if bias is None else bias.to(dtype),
        row_scale,
        loss,
    )


def _kept(
    parts: Sequence[Factors], weights: Sequence[float], rank: int, recipe: Recipe, true_B: Tensor, true_A: Tensor
) -> tuple[Tensor, Tensor]:
    """(A, B) of the combination, in the layer's own shapes."""
    first, in_group = parts[0], rank // parts[0].groups
    if recipe.on_factors:
        return _merge_factors(parts, weights, recipe)
    if recipe.combination_type == "cat":
        lifted = [
            replace(part, lora_A=part.lora_A * weight * part.scaling)
            for part, weight in zip(parts, weights, strict=True)
        ]
        kept_B, kept_A = stack([replace(part, scaling=1.0) for part in lifted], [1.0] * len(lifted))
    elif recipe.on_deltas:
        merged = merge([part.delta() for part in parts], weights, recipe)
        kept_B, kept_A = truncate_delta(first.matrices(merged), in_group, recipe)
    elif recipe.combination_type == "svd" and recipe.svd_clamp is not None:
        # A clamp depends on the signs of singular vectors, which equal PEFT's only for the SVD of the full delta.
        full = torch.stack([part.delta() * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)
        kept_B, kept_A = truncate_delta(first.matrices(full), in_group, recipe)
    else:
        kept_B, kept_A = truncate_factors(true_B, true_A, in_group, recipe)
    return unstack(kept_B, kept_A, rank, first)


def _merge_factors(parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """PEFT's formula: A and B are merged separately, each times the root of |weight * scaling|, with the sign on A."""
    strengths = [weight * part.scaling for part, weight in zip(parts, weights, strict=True)]
    on_B = [math.sqrt(abs(strength)) for strength in strengths]
    on_A = [math.copysign(root, strength) for root, strength in zip(on_B, strengths, strict=True)]
    lora_A = merge([part.lora_A for part in parts], on_A, recipe)
    return lora_A, merge([part.lora_B for part in parts], on_B, recipe)


def _combined_bias(parts: Sequence[Factors], weights: Sequence[float]) -> Tensor | None:
    biases = [
        part.bias * (weight * part.scaling)
        for part, weight in zip(parts, weights, strict=True)
        if part.bias is not None
    ]
    return torch.stack(biases).sum(0) if biases else None


def _combined_row_scale(parts: Sequence[Factors], weights: Sequence[float]) -> Tensor | None:
    """The row_scale with which one DoRA adapter has the weighted sum of the DoRA adapters' deltas.

    A delta of DoRA is ``g (W + B A) - W`` with a row_scale g for each row. The weighted sum of such
    deltas has the same form, with the row_scale ``1 + sum of weight (g - 1)``.
    """
    row_scales = [
        (part.row_scale, weight) for part, weight in zip(parts, weights, strict=True) if part.row_scale is not None
    ]
    if not row_scales:
        return None
    total = torch.ones_like(row_scales[0][0])
    for row_scale, weight in row_scales:
        total = total + weight * (row_scale - 1)
    if bool((total.abs() < 1e-6).any()):
        raise AdapterError("these weights cancel whole rows of the base weight; DoRA cannot express that")
    return total


def _with_row_scale(part: Factors, row_scale: Tensor) -> Factors:
    """Factors whose product, times the combined row_scale, is the part's contribution to the delta."""
    share = row_scale.reciprocal() if part.row_scale is None else part.row_scale / row_scale
    lora_B = part.lora_B * share.view(-1, *[1] * (part.lora_B.dim() - 1))
    return replace(part, lora_B=lora_B)
