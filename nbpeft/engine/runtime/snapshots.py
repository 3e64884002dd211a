"""An adapter as it was, kept in host memory, and how it comes back.

kept = keep(manager, "sql")          # copies; the model may change then
manager.remove("sql")
put_back(manager, kept)              # the same tensors, bit for bit, config, scale and choice
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, Rescales
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.hotswap import swap
from nbpeft.engine.injection.plan import InjectionPlan
from nbpeft.engine.runtime.adapter_tensors import is_half, is_training, weights_source
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.names import BOOKKEEPING_FIELDS

_ABOUT_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class AdapterSnapshot:
    """One adapter as it was.

    Attributes:
        name: what it was called.
        config: its config.
        weights: copies of its tensors in host memory; under ``base`` what it had put into the base model.
        place: where it was among the adapters, from 0.
        selected: which adapters were selected.
        frozen: whether it was kept from training.
        training: whether it was in training mode.
        unsaved: whether it was trained since it was added, loaded or saved.
        scale: factor on its delta.
        half: whether its parameters were in the base's half-precision dtype.
        paths: of the layers that had it.
        scalings: path -> factor that a layer was trained with, and the one that it had.
        patterns: copies of those fields of the config that a training writes to: AdaLoRA's ``rank_pattern``.
    """

    name: str
    config: AdapterConfig
    weights: AdapterWeights
    place: int
    selected: tuple[str, ...]
    frozen: bool
    training: bool | None
    unsaved: bool
    scale: float
    half: bool
    paths: frozenset[str]
    scalings: Mapping[str, tuple[float, float]]
    patterns: Mapping[str, Any]

    @property
    def byte_count(self) -> int:
        """Bytes that it takes in host memory."""
        return self.weights.byte_count


def snapshot(manager: AdapterManager, name: str) -> AdapterSnapshot:
    """Copies an adapter of a model to host memory.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    with manager.reading():
        return Keeper(manager, name)()


class Keeper:
    """Does ``keep`` later, also when the model is gone: it holds the modules of the adapter, and not the base model.

    The tensors are then those of that moment, and all else is as it was at the last ``update``.

    Args:
        manager: the model's adapters.
        name: one of them.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """

    def __init__(self, manager: AdapterManager, name: str) -> None:
        manager.require(name)
        self._name = name
        self._known_by = self._identity(manager)
        self._tensors = weights_source(manager.layers, manager.copies, name, manager.configs[name])
        self.update(manager)

    def fits(self, manager: AdapterManager) -> bool:
        """Whether the adapter of that name is the same one still."""
        return self._name in manager.configs and self._identity(manager) == self._known_by

    def update(self, manager: AdapterManager) -> None:
        """Takes over what the adapter is besides its tensors."""
        self._of_base, self._settings = manager.values_in_base(self._name), _settings(manager, self._name)

    def __call__(self) -> AdapterSnapshot:
        """The adapter, in host memory."""
        weights = self._tensors()
        weights.base = self._of_base
        return AdapterSnapshot(weights=weights.copied("cpu"), **self._settings)

    def _identity(self, manager: AdapterManager) -> tuple[int, ...]:
        """What changes when other modules take the place of the adapter's; they are held, so that no id comes again."""
        held = (layer.adapters._modules.get(self._name) for layer in manager.layers.values())
        return id(manager.configs[self._name]), *(id(module) for module in held if module is not None)


def _settings(manager: AdapterManager, name: str) -> dict[str, Any]:
    """What is kept of an adapter besides its tensors."""
    return dict(
        name=name,
        config=manager.configs[name],
        place=manager.names.index(name),
        selected=manager.selected,
        frozen=name in manager.frozen,
        training=is_training(manager.layers, name),
        unsaved=name in manager.unsaved,
        scale=manager.scale(name),
        half=is_half(manager.layers, name),
        paths=frozenset(path for path, layer in manager.layers.items() if name in layer.adapters),
        scalings=_scalings(manager, name),
        patterns=_patterns(manager.configs[name]),
    )


def restore(manager: AdapterManager, kept: AdapterSnapshot, *, in_place: bool = False) -> None:
    """Puts an adapter back under its name, in the place of the one that has it now.

    The choice of active adapters comes back, too, where this one was part of it or its replacement is.

    Args:
        manager: the model's adapters.
        kept: the adapter.
        in_place: overwrite the tensors of the one that is there, as ``hotswap.swap``.

    Raises:
        MergeError: adapters are merged.
        HotSwapError: it cannot be overwritten.
    """
    name = kept.name
    manager.refuse_merged(f"{name!r} is put back")
    with manager.transaction() as change:
        chosen = name in kept.selected or name in manager.selected
        change.keep(vars(kept.config))
        vars(kept.config).update(copy.deepcopy(dict(kept.patterns)))
        if in_place:
            swap(manager, name, kept.config, kept.weights, grow=True)
        else:
            modes: dict[str, Any] = {"trainable": not kept.frozen, "training": kept.training, "half": kept.half}
            made = manager.plan(kept.config, name).on_layers(kept.paths)
            manager.add(name, made, kept.weights.copied(), replace=True, select=False, **modes)
            manager.place(name, kept.place)
        change.keep(manager.configs)
        manager.configs[name] = kept.config
        manager.set_scale(name, kept.scale)
        for path, (trained, now) in kept.scalings.items():
            adapter: Any = manager.layers[path].adapters._modules.get(name) if path in manager.layers else None
            if isinstance(adapter, Rescales) and (adapter.trained_scaling, float(adapter.scaling)) != (trained, now):
                adapter.keep_scaling(change)
                adapter.rescale(trained, trained=True)
                if now != trained:
                    adapter.rescale(now)
        if kept.unsaved:
            manager.unsaved.add(name)
        selected = [other for other in kept.selected if other in manager.configs]
        if chosen and selected:
            manager.activate(selected)


def _patterns(config: AdapterConfig) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in vars(config).items() if type(value) is dict}


def keeps_weights(manager: AdapterManager, name: str, plan: InjectionPlan) -> bool:
    """Whether an adapter's tensors mean the same under another config: no tensor and no start would be another.

    Args:
        manager: the model's adapters.
        name: the adapter.
        plan: of the config that is to take its place.
    """
    old, new = manager.configs[name], plan.config
    if method_of(old) is not method_of(new) or old.initialised_from_weight or new.initialised_from_weight:
        return False
    ignored = {*BOOKKEEPING_FIELDS, *_ABOUT_TARGETS, *old.value_fields}
    ignored -= {field for field in ignored if field.startswith("init_")}
    size = ("rank_pattern", "r")  # whether they change anything, the shapes say
    before, after = old.to_dict(), new.to_dict()
    if any(before[field] != after.get(field) for field in before if field not in (*ignored, *size)):
        return False
    weights = manager.weights(name)
    shapes = {path: {key: tuple(one.shape) for key, one in named.items()} for path, named in weights.adapters.items()}
    wanted = {target.path: target.saved_shapes for target in plan.targets}
    return shapes == wanted and set(weights.copies) == set(plan.copies) and _shares_alike(weights, plan)


def _shares_alike(weights: AdapterWeights, plan: InjectionPlan) -> bool:
    """Whether the same layers share a tensor as in a plan of the same layers."""
    first: dict[int, str] = {}
    return all(
        first.setdefault(id(tensor), target.path) == target.tied.get(key, target.path)
        for target in plan.targets
        for key, tensor in weights.adapters[target.path].items()
    )


def has_weights(manager: AdapterManager, name: str, weights: AdapterWeights) -> bool:
    """Whether an adapter has just these tensors now, bit for bit."""
    present = manager.weights(name)
    present.base = manager.values_in_base(name)
    return present.equals(weights)


def _scalings(manager: AdapterManager, name: str) -> dict[str, tuple[float, float]]:
    """Path -> the factor that a layer was trained with and the one that it has: no config says what it is now."""
    found: dict[str, Any] = {path: layer.adapters._modules.get(name) for path, layer in manager.layers.items()}
    return {path: (one.trained_scaling, float(one.scaling)) for path, one in found.items() if isinstance(one, Rescales)}
