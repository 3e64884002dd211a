"""LoRA-GA: factors in the directions of the gradient, so that the first steps are those of full fine-tuning.

The 2r largest singular directions of a layer's gradient are divided between A and B, and B is scaled
(Wang et al. 2024, arXiv:2407.05000).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.initialization.decompositions import randomized_svd
from nbpeft.errors import ConfigError

GRADIENT = "_peft_loraga_grad"
"""Attribute of a layer with the gradient of its weight, shaped like the weight; the name is PEFT's."""
_ITERATIONS = 4
"""Iterations of the randomized decompositions, as in PEFT; here the result is reproducible."""

Factors = tuple[Tensor, Tensor]


def gradient_factors(gradient: Tensor, config: LoraConfig, site: AdapterSite) -> Factors:
    """A (r, in) and B (out, r) from the gradient of a layer's weight.

    Raises:
        ConfigError: the gradient's shape differs from the weight's.
    """
    base, settings, rank = site.base, config.lora_ga_config, config.rank_at(site.path)
    assert settings is not None
    gradient = base.kind.canonical(base.module, gradient).to(base.device, torch.float32)
    if gradient.shape != (base.out_features, base.in_features):
        raise ConfigError(
            f"{site.path}: the gradient is {tuple(gradient.shape)}, the weight "
            f"{base.out_features, base.in_features}: call preprocess_loraga with this model",
            path=site.path,
        )
    most = min(4 * rank, *gradient.shape)
    left, values, right = randomized_svd(gradient, most, _ITERATIONS)
    of_A, of_B = _shares(settings.direction, rank)
    of_A, of_B = of_A.to(values.device), of_B.to(values.device)
    lora_A, lora_B = right[of_A], left[:, of_B] * values[of_B]
    if settings.scale == "stable":
        lora_B = lora_B * (base.out_features**0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd":
        largest = randomized_svd(base.weight().float(), rank, _ITERATIONS)[1][0]
        first = values[of_B][0]
        lora_B = lora_B * (largest / first if first > 0 else 1.0)
    elif settings.scale == "gd_scale":
        scaling = config.scaling_at(site.path)
        lora_A, lora_B = lora_A / scaling, lora_B / scaling
    return lora_A, lora_B


def _shares(direction: str, rank: int) -> Factors:
    """Indices of the singular directions for A and for B, (rank,) each."""
    both = torch.arange(2 * rank)
    if direction == "random":
        drawn = torch.randperm(2 * rank)[:rank]
        return drawn, drawn
    if direction == "ArBr":
        return both[1::2], both[0::2]
    first, second = both[:rank], both[rank:]
    return (first, second) if direction == "ArB2r" else (second, first)
