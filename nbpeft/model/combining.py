"""Combining adapters of a model into a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.adapter import Adapter, AdapterWeights
from nbpeft.engine.combine import Combination, Factors, Recipe, combine, combined_config, skip_initial_draws
from nbpeft.engine.factored import MAGNITUDE
from nbpeft.engine.holder import check_name
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.plan import InjectionPlan
from nbpeft.errors import AdapterError, AdapterExistsError
from nbpeft.state import LayerLoss


@dataclass(frozen=True)
class Combined:
    """What combining made and what it lost.

    Attributes:
        name: the new adapter.
        combination_type: how it was made.
        rank: its rank (the largest, if layers differ).
        relative_error: over all layers together.
        energy_kept: over all layers together.
        layers: layer by layer, in the model's order.
    """

    name: str
    combination_type: str
    rank: int
    relative_error: float
    energy_kept: float
    layers: tuple[LayerLoss, ...]

    @property
    def worst(self) -> LayerLoss:
        """The layer with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative_error)

    def __str__(self) -> str:
        lost = "nothing lost" if self.relative_error < 1e-4 else f"relative error {self.relative_error:.1%}"
        return (
            f"{self.name}: {self.combination_type}, rank {self.rank}, {len(self.layers)} layers, "
            f"{lost}, energy kept {self.energy_kept:.1%}"
        )


@torch.no_grad()
def combine_adapters(
    manager: AdapterManager, adapters: Sequence[str], weights: Sequence[float], name: str, recipe: Recipe
) -> Combined:
    """Makes a new adapter of a weighted combination of others; it starts frozen and inactive.

    The scale of an adapter counts as it is set now. Of modules trained as a whole, the one copy
    there is goes into the new adapter.

    Args:
        manager: of the model.
        adapters: names of what is combined.
        weights: one for each; negative ones subtract.
        name: of the new adapter.
        recipe: how.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: the new name is taken.
        AdapterError: they cannot be combined.
        ConfigError: the recipe does not work on their ranks.
    """
    manager.require_reachable(*adapters)
    check_name(name)
    if name in manager.configs:
        raise AdapterExistsError(f"there is an adapter {name!r} already; delete it first or take another name")
    with manager.supplied(adapters):
        return _combined(manager, adapters, weights, name, recipe)


def _combined(
    manager: AdapterManager, adapters: Sequence[str], weights: Sequence[float], name: str, recipe: Recipe
) -> Combined:
    manager.require(*adapters)
    copies = _only_copies(manager, adapters)
    layers = _factors(manager, adapters)
    configs: list[Any] = [manager.configs[adapter] for adapter in adapters]
    if recipe.draws and len(adapters) > 1:
        _skip_draws(manager, layers, configs[0], recipe)
    combination = combine(layers, adapters, weights, recipe)
    plan = _plan(manager, configs, combination)
    named = {path: _tensors(manager.layers[path], layer) for path, layer in combination.layers.items()}
    half = all(tensor.dtype != torch.float32 for tensors in named.values() for tensor in tensors.values())
    with manager.transaction():
        manager.add(name, plan, AdapterWeights(named, copies), trainable=False, half=half)
        _set_magnitudes(manager, name, combination)
    losses = tuple(
        LayerLoss(path, layer.rank, layer.relative_error, layer.energy_kept)
        for path, layer in combination.layers.items()
    )
    kind, rank = combination.recipe.combination_type, max(loss.rank for loss in losses)
    return Combined(name, kind, rank, combination.relative_error, combination.energy_kept, losses)


def _only_copies(manager: AdapterManager, adapters: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The trained copies of whole modules, where one adapter alone has one."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, module in manager.copies.items():
        owners = [name for name in dict.fromkeys(adapters) if name in module.modules_to_save._modules]
        if len(owners) > 1:
            raise AdapterError(
                f"{' and '.join(map(repr, owners))} each trained their own {path} (modules_to_save): "
                "they cannot be combined",
                path=path,
            )
        if owners:
            found[path] = {key: value.clone() for key, value in module.modules_to_save[owners[0]].state_dict().items()}
    return found


def _factors(manager: AdapterManager, adapters: Sequence[str]) -> dict[str, dict[str, Factors]]:
    """Path -> adapter -> factors, in the model's order."""
    places = {id(layer): path for path, layer in manager.layers.items()}
    tensors = {name: manager.weights(name).adapters for name in dict.fromkeys(adapters)}
    layers: dict[str, dict[str, Factors]] = {}
    for module in manager.model.modules():
        path = places.get(id(module))
        if path is not None and isinstance(module, AdaptedLayer):
            having = [name for name in tensors if path in tensors[name]]
            layers[path] = {
                name: _factors_of(module, name, tensors[name][path], manager.scale(name)) for name in having
            }
    return layers


def _factors_of(layer: AdaptedLayer, name: str, tensors: dict[str, Tensor], scale: float) -> Factors:
    adapter: Any = layer.adapter(name)
    names = getattr(adapter, "factor_names", None)
    if names is None:
        what = "trains rows of embeddings" if adapter.shares_rows else f"is {type(adapter).__name__}"
        raise AdapterError(f"adapter {name!r} {what}: these are no low-rank factors to combine")
    # What started in a part of the base adds that part's opposite too, which no padding touches.
    whole = getattr(adapter, "start", None) is not None
    lora_A, lora_B = adapter.detached_factors if whole else (tensors[names[0]], tensors[names[1]])
    groups = getattr(layer.base_layer, "groups", 1)
    wide = torch.empty(1, 2, device="meta")
    return Factors(
        lora_A=lora_A.detach(),
        lora_B=lora_B.detach(),
        scaling=float(adapter.scaling) * scale,
        groups=groups if isinstance(groups, int) else 1,
        bias=tensors.get(f"{names[1]}_bias"),
        gain=_gain(adapter, layer),
        transposed=layer.host.canonical(layer.base_layer, wide).shape != wide.shape,
    )


def _gain(adapter: Adapter, layer: AdaptedLayer) -> Tensor | None:
    """DoRA's factor on the rows of the adapted weight: magnitude over norm."""
    magnitude = adapter._parameters.get(MAGNITUDE)
    norm: Any = getattr(adapter, "row_norm", None)
    return None if magnitude is None or norm is None else magnitude.detach().view(-1) / norm(layer.base)


def _skip_draws(manager: AdapterManager, layers: dict[str, dict[str, Factors]], first: Any, recipe: Recipe) -> None:
    """Random rules draw what PEFT draws under the same seed, which initialises the new adapter first."""
    having = {path: next(iter(named.values())) for path, named in layers.items() if named}
    largest = max((part.rank for named in layers.values() for part in named.values()), default=0)
    rank = (recipe.svd_rank if recipe.on_deltas else None) or largest
    shapes = [
        ((rank, *part.lora_A.shape[1:]), (part.lora_B.shape[0], rank // part.groups, *part.lora_B.shape[2:]))
        for part in having.values()
    ]
    lookups = [manager.layers[path].host.zero_factor == 0 for path in having]
    skip_initial_draws(shapes, lookups=lookups, init=first.init_lora_weights, lora_bias=first.lora_bias)


def _plan(manager: AdapterManager, configs: Sequence[Any], combination: Combination) -> InjectionPlan:
    """The plan of the result: just the combined layers get an adapter."""
    config = combined_config(configs, combination)
    plan = manager.plan(config)
    if set(plan.paths) == set(combination.layers):
        return plan
    everything = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return manager.plan(config.copy(target_modules=sorted(combination.layers), **everything))


def _tensors(layer: AdaptedLayer, combined: Any) -> dict[str, Tensor]:
    name_A, name_B = layer.host.factor_names
    tensors = {name_A: combined.lora_A, name_B: combined.lora_B}
    if combined.bias is not None:
        tensors[f"{name_B}_bias"] = combined.bias
    return tensors


def _set_magnitudes(manager: AdapterManager, name: str, combination: Combination) -> None:
    """Gives a DoRA result the magnitudes that make its delta the exact sum."""
    if combination.recipe.combination_type != "exact":
        return
    for path, combined in combination.layers.items():
        layer = manager.layers[path]
        adapter = layer.adapter(name)
        magnitude = adapter._parameters.get(MAGNITUDE)
        norm: Any = getattr(adapter, "row_norm", None)
        if magnitude is not None and norm is not None:
            length = norm(layer.base)
            magnitude.copy_((length if combined.gain is None else length * combined.gain).view(magnitude.shape))
