"""Snapshots of an adapter in host memory, and how they are restored.

saved = snapshot(manager, "sql")     # copies: the model may change afterwards
manager.remove("sql")
restore(manager, saved)              # the same tensors, bit for bit, config, scale and selection
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, Rescales
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.hotswap import swap
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.adapter_tensors import is_half, is_training, weights_source
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.names import BOOKKEEPING_FIELDS

_ABOUT_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class AdapterSnapshot:
    """An adapter at one moment.

    Attributes:
        name: name of the adapter.
        config: its config.
        weights: copies of its tensors in host memory; ``base`` has its tensors in the base model.
        place: its index among the adapters.
        selected: which adapters were selected.
        frozen: whether it was frozen.
        training: whether it was in training mode.
        unsaved: whether it was trained since it was added, loaded or saved.
        scale: factor on its delta.
        half: whether its parameters were in the base's half-precision dtype.
        paths: paths of the layers with the adapter.
        scalings: path -> (scaling the layer was trained with, current scaling).
        patterns: copies of config fields that training changes (AdaLoRA's ``rank_pattern``).
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
        """Size in host memory, in bytes."""
        return self.weights.byte_count


def snapshot(manager: AdapterManager, name: str) -> AdapterSnapshot:
    """Copies an adapter of a model to host memory.

    Args:
        manager: the model's manager.
        name: the adapter.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    with manager.reading():
        return Keeper(manager, name)()


class Keeper:
    """Takes a snapshot later, even after the model was deleted: it only references the adapter's modules.

    The tensors are read at the time of the call, everything else at the last ``update``.

    Args:
        manager: the model's manager.
        name: the adapter.

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
        """Whether the model still has the same adapter under its name."""
        return self._name in manager.configs and self._identity(manager) == self._known_by

    def update(self, manager: AdapterManager) -> None:
        """Records everything about the adapter except its tensors."""
        self._of_base, self._settings = manager.biases.present(self._name), _settings(manager, self._name)

    def __call__(self) -> AdapterSnapshot:
        """Takes the snapshot."""
        weights = self._tensors()
        weights.base = self._of_base
        return AdapterSnapshot(weights=weights.copied("cpu"), **self._settings)

    def _identity(self, manager: AdapterManager) -> tuple[int, ...]:
        """Ids that change when the adapter's modules are replaced."""
        # Python cannot reuse these ids, because ``_tensors`` keeps the modules alive.
        layers = manager.layers_with(self._name).values()
        return id(manager.configs[self._name]), *(id(layer.adapter(self._name)) for layer in layers)


def _settings(manager: AdapterManager, name: str) -> dict[str, Any]:
    """The fields of a snapshot other than the tensors."""
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
        paths=frozenset(manager.layers_with(name)),
        scalings=_scalings(manager, name),
        patterns=_patterns(manager.configs[name]),
    )


def restore(manager: AdapterManager, kept: AdapterSnapshot, *, in_place: bool = False) -> None:
    """Restores an adapter under its name, replacing a present adapter of that name.

    The selection is restored too if it included this adapter, or includes the replaced one.

    Args:
        manager: the model's manager.
        kept: the snapshot.
        in_place: overwrite the tensors of the present adapter with ``hotswap.swap``.

    Raises:
        MergeError: adapters are merged.
        HotSwapError: the present adapter cannot be overwritten.
    """
    name = kept.name
    manager.refuse_merged(f"{name!r} is restored")
    with manager.transaction() as change:
        chosen = name in kept.selected or name in manager.selected
        change.keep(vars(kept.config))
        vars(kept.config).update(copy.deepcopy(dict(kept.patterns)))
        if in_place:
            swap(manager, name, kept.config, kept.weights, grow=True)
        else:
            modes: dict[str, Any] = {"trainable": not kept.frozen, "training": kept.training, "half": kept.half}
            plan = manager.plan(kept.config, name, is_new=False).on_layers(kept.paths)
            manager.add(name, plan, kept.weights.copied(), replace=True, select=False, **modes)
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


def undo_additions(manager: AdapterManager, added: Iterable[str], selected: tuple[str, ...], *, enabled: bool) -> None:
    """Removes adapters that were added, and restores the previous selection.

    Args:
        manager: the model's manager.
        added: the adapters to remove; those already deleted are ignored.
        selected: the adapters that were selected before; empty for no change.
        enabled: whether adapters were enabled before.
    """
    with manager.transaction():
        for name in added:
            if name in manager.configs:
                manager.remove(name)
        if selected and manager.selected != selected:
            manager.activate(selected)
        if not enabled and manager.enabled:
            manager.disable()


def _patterns(config: AdapterConfig) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in vars(config).items() if type(value) is dict}


def keeps_weights(manager: AdapterManager, name: str, plan: InjectionPlan) -> bool:
    """Whether an adapter's tensors are valid with another config: same shapes and same initialization.

    Args:
        manager: the model's manager.
        name: the adapter.
        plan: the plan of the other config.
    """
    old, new = manager.configs[name], plan.config
    if method_of(old) is not method_of(new) or old.initialised_from_weight or new.initialised_from_weight:
        return False
    ignored = {*BOOKKEEPING_FIELDS, *_ABOUT_TARGETS, *old.value_fields}
    ignored -= {field for field in ignored if field.startswith("init_")}
    size = ("rank_pattern", "r")  # compared by the shapes below
    before, after = old.to_dict(), new.to_dict()
    if any(before[field] != after.get(field) for field in before if field not in (*ignored, *size)):
        return False
    weights = manager.weights(name)
    shapes = {path: {key: tuple(t.shape) for key, t in tensors.items()} for path, tensors in weights.adapters.items()}
    expected = {target.path: target.saved_shapes for target in plan.targets}
    return shapes == expected and set(weights.copies) == set(plan.copies) and _shares_alike(weights, plan)


def _shares_alike(weights: AdapterWeights, plan: InjectionPlan) -> bool:
    """Whether layers share tensors as in a plan of the same layers."""
    first: dict[int, str] = {}
    return all(
        first.setdefault(id(tensor), target.path) == target.tied.get(key, target.path)
        for target in plan.targets
        for key, tensor in weights.adapters[target.path].items()
    )


def has_weights(manager: AdapterManager, name: str, weights: AdapterWeights) -> bool:
    """Whether an adapter's tensors equal these, bit for bit.

    Args:
        manager: the model's manager.
        name: the adapter.
        weights: the tensors to compare with.
    """
    present = manager.weights(name)
    present.base = manager.biases.present(name)
    return present.equals(weights)


def _scalings(manager: AdapterManager, name: str) -> dict[str, tuple[float, float]]:
    """Path -> (scaling the layer was trained with, current scaling); neither is in the config."""
    adapters = {path: layer.adapter(name) for path, layer in manager.layers_with(name).items()}
    return {
        path: (adapter.trained_scaling, float(adapter.scaling))
        for path, adapter in adapters.items()
        if isinstance(adapter, Rescales)
    }
