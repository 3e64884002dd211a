"""The config of a combination."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nbpeft.engine.methods.lora.combining.layers import CombinedFactors
from nbpeft.engine.methods.lora.init_configs import no_settings
from nbpeft.engine.methods.lora.variant_configs import no_variant
from nbpeft.errors import ConfigError

_SELECTORS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def combined_config(configs: Sequence[Any], combination: CombinedFactors) -> Any:
    """The config of a combination, from the LoRA configs of its adapters.

    It is the first adapter's config with the rank of the combination and an alpha that makes every scaling 1, without
    rsLoRA. Targets are merged as in PEFT; if that is not possible, the combined layers are listed by their full paths.

    Raises:
        ConfigError: the combination would be a DoRA adapter with a bias.
    """
    first, rank = configs[0], combination.rank
    layers = combination.layers.values()
    is_exact = combination.recipe.combination_type == "exact"
    use_dora = any(layer.row_scale is not None for layer in layers) if is_exact else first.use_dora
    lora_bias = any(layer.bias is not None for layer in layers)
    if use_dora and lora_bias:
        raise ConfigError(
            "adapters with lora_bias=True and with use_dora=True cannot be combined: DoRA does not support the bias; "
            "remove one of them",
            field="lora_bias",
        )
    ranks = rank_patterns(combination.ranks_apart, combination.layers)
    return first.copy(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        use_rslora=False,
        init_lora_weights=True,
        **no_settings(),
        **no_variant(),
        ensure_weight_tying=False,
        lora_bias=lora_bias,
        use_dora=use_dora,
        **_targets(configs, combination),
    )


def rank_patterns(apart: Mapping[str, int], paths: Collection[str]) -> dict[str, int]:
    """Path pattern -> rank, longest path first, because the first match at the end of a path wins.

    Args:
        apart: path -> rank of the layers whose rank differs from the others'.
        paths: paths of all adapted layers.
    """
    patterns = {}
    for path in sorted(apart, key=len, reverse=True):
        shadows = any(other.endswith(f".{path}") and other not in apart for other in paths)
        patterns[f"^{path}" if shadows else path] = apart[path]
    return patterns


def _targets(configs: Sequence[Any], combination: CombinedFactors) -> dict[str, Any]:
    targets = [config.target_modules for config in configs]
    selectors = [[getattr(config, name) for name in _SELECTORS] for config in configs]
    if all(selector == selectors[0] for selector in selectors):
        if all(target == targets[0] for target in targets) and targets[0]:
            return {"target_modules": targets[0]}
        if all(isinstance(target, list | tuple | set) for target in targets):
            return {"target_modules": set().union(*targets)}
        if all(isinstance(target, str) and target != "all-linear" for target in targets):
            return {"target_modules": "|".join(f"({target})" for target in targets)}
    return {"target_modules": set(combination.layers), **dict.fromkeys(_SELECTORS)}
