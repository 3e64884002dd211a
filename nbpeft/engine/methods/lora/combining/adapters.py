"""From adapters on layers to factors and back: the engine's entry point for combining LoRA and DoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter import Adapter, AdapterSite
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.combination import Combination, Member
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.combining.config import combined_config
from nbpeft.engine.methods.lora.combining.factors import Factors
from nbpeft.engine.methods.lora.combining.layers import CombinedLayer, combine
from nbpeft.engine.methods.lora.combining.recipe import Recipe, settings_for
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.initialization.inits import drawing_start
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.errors import AdapterError, ConfigError, did_you_mean
from nbpeft.names import COMBINATION_TYPES


class CombineLowRank:
    """Combines adapters with low-rank factors; see ``Recipe`` for the settings."""

    types = COMBINATION_TYPES
    usual_type = "svd"

    def takes(self, combination_type: str) -> Sequence[str]:
        """The names of the settings that a combination type uses."""
        return settings_for(combination_type)

    def check(self, configs: Sequence[Any], adapters: Sequence[str]) -> None:
        """Raises AdapterError if adapters with these configs cannot be combined; any can, except in subclasses."""

    def __call__(
        self,
        layers: Mapping[str, Mapping[str, Member]],
        configs: Sequence[Any],
        adapters: Sequence[str],
        weights: Sequence[float],
        settings: Mapping[str, Any],
    ) -> Combination:
        self.check(configs, adapters)
        recipe = _recipe(settings)
        factors = {
            path: {name: _factors(name, member) for name, member in members.items()} for path, members in layers.items()
        }
        kinds = {path: next(iter(members.values())).base.kind for path, members in layers.items() if members}
        if recipe.draws:
            with suppress(ConfigError):  # where PEFT could not initialize it
                _draw_as_new(layers, configs, recipe)
        combined = combine(factors, adapters, weights, recipe)
        tensors = {path: _tensors(kinds[path], layer) for path, layer in combined.layers.items()}
        # Only ``exact`` uses DoRA's row scales.
        rescaled = any(part.row_scale is not None for named in factors.values() for part in named.values())
        known = not rescaled or recipe.combination_type == "exact" or len(adapters) == 1
        losses = {path: layer.loss for path, layer in combined.layers.items()} if known else None

        def finish(path: str, adapter: Adapter, base: BaseLayer) -> None:
            """Sets the magnitude of a DoRA result so that its delta is the exact sum."""
            row_scale = combined.layers[path].row_scale
            if isinstance(adapter, LowRankAdapter) and (row_scale is not None or recipe.combination_type == "exact"):
                adapter.set_row_scale_(row_scale, base)

        config = combined_config(configs, combined)
        return Combination(config, tensors, combined.recipe.combination_type, losses, finish)


combine_low_rank = CombineLowRank()


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    known = Recipe.__dataclass_fields__
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"combining has no setting {unknown!r}.{did_you_mean(unknown, known)}", field=unknown)
    return Recipe(**settings)


def _factors(name: str, member: Member) -> Factors:
    adapter, base = member.adapter, member.base
    if not isinstance(adapter, LowRankAdapter):
        raise AdapterError(f"adapter {name!r} is {type(adapter).__name__}: these are no low-rank factors to combine")
    name_A, name_B = adapter.factor_names
    # Adapters initialized from the weight also subtract the initial component, and some methods compute their factors:
    # neither are padded.
    whole = adapter.initial is not None or adapter.computes_factors
    lora_A, lora_B = adapter.detached_factors if whole else (member.tensors[name_A], member.tensors[name_B])
    groups = getattr(base.module, "groups", 1)
    return Factors(
        lora_A=lora_A.detach(),
        lora_B=lora_B.detach(),
        scaling=float(adapter.scaling) * member.scale,
        groups=groups if isinstance(groups, int) else 1,
        bias=member.tensors.get(f"{name_B}_bias"),
        row_scale=adapter.row_scale(base),
        transposed=_is_transposed(base),
    )


def _draw_as_new(layers: Mapping[str, Mapping[str, Member]], configs: Sequence[LoraConfig], recipe: Recipe) -> None:
    """Draws as PEFT does, which initializes the new adapter before it prunes at random."""
    rank = recipe.svd_rank if recipe.combination_type.endswith("svd") else None
    rank = rank or max(max(config.r, *config.rank_pattern.values(), 0) for config in configs)
    new = configs[0].copy(r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={})
    for path, members in layers.items():
        for member in list(members.values())[:1]:
            adapter, base = member.adapter, member.base
            if isinstance(adapter, LowRankAdapter):
                shapes = adapter.parameter_shapes(new, path, base.module, base.kind)
                site = AdapterSite(path, base, shapes, torch.float32)
                adapter.drawn_tensors(new, site, drawing_start(new, site))


def _is_transposed(base: BaseLayer) -> bool:
    """Whether the layer stores its weight as (in, out)."""
    wide = torch.empty(1, 2, device="meta")
    return base.kind.canonical(base.module, wide).shape != wide.shape


def _tensors(kind: Any, combined: CombinedLayer) -> dict[str, Tensor]:
    name_A, name_B = low_rank_of(kind).factor_names
    tensors = {name_A: combined.lora_A, name_B: combined.lora_B}
    if combined.bias is not None:
        tensors[f"{name_B}_bias"] = combined.bias
    return tensors
