"""Renaming an adapter, moving it in the order of adapters, and copying it."""

from __future__ import annotations

from typing import Any

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.contract.adapter import Rescales
from nbpeft.engine.runtime.adapter_tensors import is_half
from nbpeft.errors import AdapterError, AdapterExistsError


def rename(manager: Any, old: str, new: str, change: Transaction) -> None:
    """Renames an adapter; its position in all orders stays the same.

    Args:
        manager: the model's manager.
        old: the current name.
        new: the new name.
        change: records what is written.

    Raises:
        AdapterExistsError: another adapter has the new name.
        MergeError: the adapter is merged.
    """

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if name == old else name for name in names)

    check_name(new)
    manager.require(old)
    if new in manager.configs:
        raise AdapterExistsError(f"Adapter with name {new!r} already exists; choose another name")
    if old in manager.merged:
        manager.refuse_merged(f"{old!r} is renamed")
    manager._keep_structure(change)
    for by_name in (*manager._holders(), manager.configs):
        items = [(new if name == old else name, value) for name, value in by_name.items()]
        by_name.clear()
        by_name.update(items)
    manager.layer_commands.apply_pending(change)
    manager._biases.rename(old, new)
    manager._slots.pop(old, None)
    manager._scales = {new if name == old else name: scale for name, scale in manager._scales.items()}
    manager.frozen, manager.unsaved = set(renamed((*manager.frozen,))), set(renamed((*manager.unsaved,)))
    manager._selected, manager._parked = renamed(manager._selected), renamed(manager._parked)
    manager._parked_layers = {path: renamed(names) for path, names in manager._parked_layers.items()}
    for scope in manager.active_state.scopes:
        scope.names = renamed(scope.names)
    manager.refresh((), change)


def place_among(manager: Any, name: str, place: int, change: Transaction) -> None:
    """Moves an adapter to another index among the adapters.

    Args:
        manager: the model's manager.
        name: the adapter.
        place: the new index among the adapters.
        change: records the order.
    """
    manager.require(name)
    configs = manager.configs
    change.keep(configs)
    configs.place(name, configs[name], place)


def copy_adapter(manager: Any, name: str, new: str) -> None:
    """Adds an independent copy of an adapter; call it inside a transaction.

    Args:
        manager: the model's manager.
        name: the adapter to copy.
        new: name of the copy.

    Raises:
        AdapterError: it trains biases of the base model.
    """
    weights = manager.weights(name)
    if weights.base:
        raise AdapterError(f"adapter {name!r} trains base biases, which cannot belong to two adapters")
    twin, half = weights.copied(), is_half(manager.layers, name)
    there = {*manager.layers_with(name)}  # without layers from which it was deleted
    plan = manager.plan(manager.configs[name], is_new=False).on_layers(there)
    manager.add(new, plan, twin, trainable=name not in manager.frozen, half=half)
    manager.set_scale(new, manager.scale(name))
    if name in manager.unsaved:
        manager.unsaved.add(new)
    for layer in manager.layers.values():
        adapters: dict[str, Any] = layer.adapters._modules
        old, added = adapters.get(name), adapters.get(new)
        if isinstance(old, Rescales) and isinstance(added, Rescales):
            added.rescale(float(old.scaling))
