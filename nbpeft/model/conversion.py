"""Adapters that started in a part of the base (OLoRA, PiSSA), written as plain LoRA.

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

Twice the rank, and it can be used on any copy of the base without working the start out again.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from nbpeft.engine.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.factored import FactoredAdapter
from nbpeft.engine.manager import AdapterManager
from nbpeft.errors import AdapterError


def as_plain_lora(manager: AdapterManager, name: str, weights: AdapterWeights) -> tuple[AdapterConfig, AdapterWeights]:
    """The config and tensors of an adapter as those of a plain one that adds the same.

    Args:
        manager: has the adapter.
        name: which one.
        weights: its tensors, as they would be saved.

    Raises:
        AdapterError: its method or its patterns of ranks and alphas do not allow it.
    """
    config: Any = manager.configs[name]
    started = {
        path: adapter.start
        for path, layer in manager.layers.items()
        if isinstance(adapter := layer.adapters._modules.get(name), FactoredAdapter) and adapter.start is not None
    }
    if not started:
        warnings.warn(f"adapter {name!r} did not start in a part of the base: it is saved as it is", stacklevel=5)
        return config, weights
    if config.use_dora:
        raise AdapterError(f"adapter {name!r} is DoRA, whose norm a plain LoRA does not have: save it as it is")
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise AdapterError(f"adapter {name!r} joins use_rslora with rank_pattern or alpha_pattern: save it as it is")
    adapters = dict(weights.adapters)
    for path, (start_A, start_B) in started.items():
        name_A, name_B = manager.layers[path].host.factor_names
        lora_A, lora_B = adapters[path][name_A], adapters[path][name_B]
        adapters[path] = {
            **adapters[path],
            name_A: torch.cat([lora_A, start_A.to(lora_A)]),
            name_B: torch.cat([lora_B, start_B.to(lora_B)], 1),
        }
    return _doubled(config), AdapterWeights(adapters, weights.copies, weights.base)


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
