"""Combining adapters of a model into a new adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft import checkpoint
from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.changes.transaction import CHANGED_MEANWHILE
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, delta_of
from nbpeft.engine.contract.combination import Combine, Loss, Member, check_weights
from nbpeft.engine.contract.registry import companions, method_of
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, ConfigError, did_you_mean
from nbpeft.jsonable import AsDict
from nbpeft.model.saving.offloaded import adapters_onloaded
from nbpeft.state import LayerLoss


@dataclass(frozen=True)
class Combined(AsDict):
    """A combined adapter and its approximation error.

    Attributes:
        name: name of the new adapter.
        combination_type: how it was computed.
        rank: its rank (the largest, if layers differ); None for methods without a rank.
        relative_error: norm of the error divided by the norm of the exact sum, over all layers.
        energy_kept: share of the exact sum's squared norm that is preserved, over all layers.
        layers: the errors of each layer, in the model's order.
    """

    name: str
    combination_type: str
    rank: int | None
    relative_error: float
    energy_kept: float
    layers: tuple[LayerLoss, ...]

    @property
    def worst(self) -> LayerLoss:
        """The layer with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative_error)

    def __str__(self) -> str:
        lost = "nothing lost" if self.relative_error < 1e-4 else f"relative error {self.relative_error:.1%}"
        rank = "" if self.rank is None else f"rank {self.rank}, "
        return (
            f"{self.name}: {self.combination_type}, {rank}{len(self.layers)} layers, "
            f"{lost}, energy kept {self.energy_kept:.1%}"
        )


@torch.no_grad()
def combine_adapters(
    manager: AdapterManager,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    settings: Mapping[str, Any],
) -> Combined:
    """Adds the weighted combination of several adapters as a new adapter, which is frozen and inactive.

    The current scale of each adapter is included. If only one of the adapters has trained a copy of a module
    (``modules_to_save``), the new adapter gets that copy. Changes of token embeddings are summed for every type.

    Args:
        manager: manager of the model.
        adapters: names of the adapters to combine.
        weights: one factor per adapter; negative ones subtract.
        name: name of the new adapter.
        settings: ``combination_type`` and the options of that type.

    Returns:
        The new adapter's name, rank and errors.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: the new name is taken.
        AdapterError: the adapters cannot be combined.
        ConfigError: the settings are invalid, or not possible for these adapters.
    """
    check_weights(adapters, weights)
    manager.require_available(*adapters)
    check_name(name)
    if name in manager.configs:
        raise AdapterExistsError(f"Adapter with name {name!r} already exists; delete it first or choose another name")
    with manager.ensure_loaded(adapters), manager.deciding(), adapters_onloaded(manager, *adapters):
        return _combined(manager, adapters, weights, name, settings)


def _combined(
    manager: AdapterManager, adapters: Sequence[str], weights: Sequence[float], name: str, settings: Mapping[str, Any]
) -> Combined:
    manager.require(*adapters)
    copies = _only_copies(manager, adapters)
    configs: list[Any] = [manager.configs[adapter] for adapter in adapters]
    combine = combine_of(manager, adapters)
    settings = {**settings, "combination_type": _checked_type(settings, combine, configs[0])}
    members = _members(manager, adapters)
    fields, rows = _combined_companions(manager, members, adapters, weights)
    combination = combine(members, configs, adapters, weights, settings)
    for field, value in fields.items():
        setattr(combination.config, field, value)
    if combination.losses is None:
        manager.refuse_merged("combining adapters whose update depends on the frozen weights")
    copied = [name for config in configs for name in getattr(config, "modules_to_save", None) or ()]
    if copied:
        combination.config.modules_to_save = list(dict.fromkeys(copied))
    checkpoint.set_prompt_format(combination.config, checkpoint.common_format(configs))
    tensors = combination.tensors | rows
    plan = plan_on(manager, combination.config, tensors)
    half = all(tensor.dtype != torch.float32 for named in tensors.values() for tensor in named.values())
    with manager.transaction():
        if any(manager.configs.get(adapter) is not config for adapter, config in zip(adapters, configs, strict=True)):
            raise BusyError(CHANGED_MEANWHILE)
        manager.prepare(name, plan, AdapterWeights(tensors, copies), trainable=False, half=half)()
        for path in combination.tensors:
            layer = manager.layers[path]
            combination.finish(path, layer.adapter(name), layer.base)
        losses = combination.losses
        if losses is None:
            pairs = zip(adapters, weights, strict=True)
            weighted = [(adapter, weight * manager.scale(adapter)) for adapter, weight in pairs]
            losses = {path: _measured(manager.layers[path], weighted, name) for path in combination.tensors}
        ranks = {path: manager.layers[path].adapter(name).delta_rank for path in losses}
    total = sum(losses.values(), Loss())
    return Combined(
        name,
        combination.combination_type,
        max((rank for rank in ranks.values() if rank is not None), default=None),
        total.relative_error,
        total.energy_kept,
        tuple(LayerLoss(path, ranks[path], loss.relative_error, loss.energy_kept) for path, loss in losses.items()),
    )


def _checked_type(settings: Mapping[str, Any], combine: Combine, config: AdapterConfig) -> str:
    """Returns the type of a combination: that of the settings, or the usual one of the method.

    Raises:
        ConfigError: the method of the config has no such type.
    """
    chosen: str = settings.get("combination_type") or combine.usual_type
    if chosen not in combine.types:
        raise ConfigError(
            f"{method_of(config).label} has no combination_type {chosen!r}; choose from "
            f"{', '.join(combine.types)}." + did_you_mean(str(chosen), combine.types),
            combination_type=chosen,
        )
    return chosen


def _measured(layer: AdaptedLayer, weighted: Sequence[tuple[str, float]], name: str) -> Loss:
    """Returns the loss of an adapter on a layer, compared with the weighted sum of the deltas of other adapters."""
    check_interrupt()
    weight = layer.base.weight().float()
    delta = delta_of(layer.adapter(name), weight, layer.base)
    exact = torch.zeros_like(delta)
    for adapter, factor in weighted:
        if adapter in layer.adapters._modules:
            exact += delta_of(layer.adapter(adapter), weight, layer.base) * factor
    return Loss.between(exact, delta)


def combine_of(manager: AdapterManager, adapters: Sequence[str]) -> Combine:
    """Returns how adapters of the model are combined.

    Args:
        manager: manager of the model.
        adapters: names of the adapters.

    Raises:
        AdapterError: their method cannot be combined, or their methods are of different kinds.
    """
    methods = [method_of(manager.configs[adapter]) for adapter in adapters]
    for name, method in zip(adapters, methods, strict=True):
        if getattr(manager.configs[name], "target_parameters", None):
            raise AdapterError(
                f"adapter {name!r} adapts bare parameters (target_parameters) and cannot be combined: "
                "add_weighted_adapter does not support targeting nn.Parameter"
            )
        if method.combine is None:
            raise AdapterError(
                f"adapter {name!r} is {method.label}, which cannot be combined: activate both at once instead"
            )
        if method.combine is not methods[0].combine:
            raise AdapterError(
                f"adapter {adapters[0]!r} is {methods[0].label} and {name!r} is {method.label}: only adapters of the "
                "same method can be combined; activate both at once instead"
            )
    combine = methods[0].combine
    assert combine is not None
    return combine


def _only_copies(manager: AdapterManager, adapters: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Returns path -> state dict of the trained modules that only one of the adapters has (``modules_to_save``)."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, module in manager.copies.items():
        owners = [name for name in dict.fromkeys(adapters) if name in module.modules_to_save._modules]
        if len(owners) > 1:
            raise AdapterError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found 1 such "
                f"instance(s). {' and '.join(map(repr, owners))} each trained their own {path}",
                path=path,
            )
        if owners:
            found[path] = {key: value.clone() for key, value in module.modules_to_save[owners[0]].state_dict().items()}
    return found


def _members(manager: AdapterManager, adapters: Sequence[str]) -> dict[str, dict[str, Member]]:
    """Returns path -> adapter name -> member, in the model's order."""
    places = {id(layer): path for path, layer in manager.layers.items()}
    tensors = {name: manager.weights(name).adapters for name in dict.fromkeys(adapters)}
    layers: dict[str, dict[str, Member]] = {}
    for module in manager.model.modules():
        path = places.get(id(module))
        if path is not None and isinstance(module, AdaptedLayer):
            layers[path] = {
                name: Member(module.adapter(name), module.base, tensors[name][path], manager.scale(name))
                for name in tensors
                if path in tensors[name]
            }
    return layers


def _combined_companions(
    manager: AdapterManager, layers: dict[str, dict[str, Member]], adapters: Sequence[str], weights: Sequence[float]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Combines the companion adapters that configs request, and removes their layers from ``layers``.

    Returns:
        Config fields of the combination, and path -> parameter name -> tensor.
    """
    fields: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for method in companions():
        assert method.shares.companion is not None
        parts = {}
        for path, members in list(layers.items()):
            own = [name for name, member in members.items() if isinstance(member.adapter, method.adapter_class)]
            if own and len(own) < len(members):
                other = next(name for name in members if name not in own)
                raise AdapterError(
                    f"{path} has {method.label} in adapter {own[0]!r} and another update in {other!r}: one adapter "
                    "cannot have both; activate both at once instead",
                    path=path,
                )
            if own:
                del layers[path]
                pairs = zip(adapters, weights, strict=True)
                parts[path] = [(members[adapter], weight) for adapter, weight in pairs if adapter in members]
        if parts:
            manager.refuse_merged(f"combining adapters with {method.label}")
            fields[method.shares.companion.field], found = method.shares.companion.combine(parts)
            tensors |= found
    return fields, tensors


def plan_on(manager: AdapterManager, config: Any, paths: Collection[str]) -> InjectionPlan:
    """Returns the plan of a config on exactly the given layers.

    If the config's own targets select other layers, the returned plan's config lists the paths instead.

    Args:
        manager: manager of the model.
        config: config of a method that has targets.
        paths: paths of the layers.
    """
    plan = manager.plan(config)
    if set(plan.paths) == set(paths):
        return plan
    everything = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return manager.plan(config.copy(target_modules=sorted(paths), **everything))
