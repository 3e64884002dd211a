"""Adapters rewritten as plain LoRA.

Adapters initialized from the weight (OLoRA, PiSSA, KaSA) get twice the rank, and can then be used on any copy of the
base without recomputing their initial component.

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

Adapters with several ranks or scalings are padded with zeros to the largest rank, and B is multiplied by the ratio of
the scalings, for programs that support only one rank and one alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, LowRankDelta
from nbpeft.engine.contract.base import LayerKind
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.init_configs import no_settings
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.engine.methods.lora.variant_configs import no_variant
from nbpeft.errors import AdapterError

KEPT_FIELDS = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save", "bias")
"""Fields of a config that are also valid for the LoRA that replaces it."""


def as_plain_lora(
    config: Any, adapters: Mapping[str, Any], weights: AdapterWeights
) -> tuple[AdapterConfig, AdapterWeights]:
    """Returns the config and tensors of a plain LoRA with the same delta as an adapter.

    Args:
        config: the adapter's config.
        adapters: path -> the adapter on that layer.
        weights: the adapter's tensors, as they would be saved.

    Raises:
        AdapterError: its method, or its patterns of ranks and alphas, do not allow it.
    """
    started = {path: (adapters[path], start) for path, start in weights.starts.items()}
    if config.use_dora:
        raise AdapterError("it is DoRA, whose norm a plain LoRA does not have: save it without conversion")
    if config.init_name == "loftq":
        raise AdapterError("LoftQ replaced the base's weights: save it without conversion, together with the base")
    lost = any(adapter.loses_start for adapter, _ in started.values())
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern) and not lost:
        raise AdapterError("it combines use_rslora with rank_pattern or alpha_pattern: save it without conversion")
    tensors = dict(weights.adapters)
    for path, (adapter, start) in started.items():
        name_A, name_B = adapter.factor_names
        saved = tensors[path]
        lora_A, lora_B = adapter.own_factors if adapter.computes_factors else (saved[name_A], saved[name_B])
        tensors[path] = {
            **{key: tensor for key, tensor in saved.items() if key == f"{name_B}_bias"},
            name_A: torch.cat([lora_A, start.down.to(lora_A)]),
            name_B: torch.cat([lora_B, start.neg_up.to(lora_B)], 1),
        }
    return _doubled(config, tensors.keys() - started.keys()), AdapterWeights(tensors, weights.copies, weights.base)


def as_uniform_lora(
    config: AdapterConfig, deltas: Mapping[str, tuple[LayerKind, LowRankDelta]], weights: AdapterWeights
) -> tuple[LoraConfig, AdapterWeights]:
    """Returns the config and tensors of a plain LoRA with one rank, one scaling and the same deltas.

    Args:
        config: the adapter's config, whose task and base model are kept.
        deltas: path -> the kind of layer, and its delta.
        weights: the adapter's saved tensors, of which trained copies and biases are kept.
    """
    rank = max(delta.rank for _, delta in deltas.values())
    scalings = [delta.scaling for _, delta in deltas.values()]
    scaling = max(scalings, key=scalings.count) or 1.0
    alpha = scaling * rank
    tensors = {}
    for path, (kind, delta) in deltas.items():
        name_A, name_B = low_rank_of(kind).factor_names
        up = delta.up if delta.scaling == scaling else delta.up * (delta.scaling / scaling)
        tensors[path] = {name_A: padded(delta.down, 0, rank), name_B: padded(up, 1, rank)}
        if delta.bias is not None:
            tensors[path][f"{name_B}_bias"] = delta.bias / scaling
    uniform = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=list(deltas),
        lora_bias=any(delta.bias is not None for _, delta in deltas.values()),
        **{name: getattr(config, name) for name in KEPT_FIELDS if hasattr(config, name)},
    )
    return uniform, AdapterWeights(tensors, weights.copies, weights.base)


def padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    """A factor padded with zeros to a rank along a dimension."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _doubled(config: Any, others: Iterable[str]) -> AdapterConfig:
    """The config with twice the rank and the same scaling, except for the layers at some paths."""
    factor = 2**0.5 if config.use_rslora else 2
    kept = sorted(others)
    ranks = {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()}
    alphas = {pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()}
    return config.copy(
        init_lora_weights=True,
        **no_settings(),
        **no_variant(),
        r=2 * config.r,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={path: config.rank_at(path) for path in kept} | ranks,
        alpha_pattern={path: config.alpha_at(path) for path in kept} | alphas,
    )
