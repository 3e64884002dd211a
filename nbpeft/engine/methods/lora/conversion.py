"""Adapters initialised from the weight (OLoRA, PiSSA), rewritten as plain LoRA.

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

Twice the rank, and it can be used on any copy of the base without computing the start again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbpeft.engine.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.errors import AdapterError


def as_plain_lora(
    config: Any, adapters: Mapping[str, Any], weights: AdapterWeights
) -> tuple[AdapterConfig, AdapterWeights]:
    """Returns the config and tensors of an adapter as those of a plain one that adds the same.

    Args:
        config: its config.
        adapters: path -> the adapter on that layer.
        weights: its tensors, as they would be saved.

    Raises:
        AdapterError: its method or its patterns of ranks and alphas do not allow it.
    """
    started = {
        path: (adapter, adapter.initial)
        for path, adapter in adapters.items()
        if isinstance(adapter, LowRankAdapter) and adapter.initial is not None
    }
    if config.use_dora:
        raise AdapterError("it is DoRA, whose norm a plain LoRA does not have: save it as it is")
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise AdapterError("it joins use_rslora with rank_pattern or alpha_pattern: save it as it is")
    tensors = dict(weights.adapters)
    for path, (adapter, (init_A, neg_init_B)) in started.items():
        name_A, name_B = adapter.factor_names
        lora_A, lora_B = tensors[path][name_A], tensors[path][name_B]
        tensors[path] = {
            **tensors[path],
            name_A: torch.cat([lora_A, init_A.to(lora_A)]),
            name_B: torch.cat([lora_B, neg_init_B.to(lora_B)], 1),
        }
    return _doubled(config), AdapterWeights(tensors, weights.copies, weights.base)


def _doubled(config: Any) -> AdapterConfig:
    """The config at twice the rank with the same scaling."""
    doubled: AdapterConfig = config.copy(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * (2**0.5 if config.use_rslora else 2),
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: 2 * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    return doubled
