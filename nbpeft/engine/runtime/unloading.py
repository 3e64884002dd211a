"""Removing all adapters of a model permanently, merged into its weights or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nbpeft.engine.changes.active_state import NO_ADAPTERS
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.adapter_names import ByName, names_in
from nbpeft.engine.injection.build import replace_modules
from nbpeft.engine.runtime.merging import (
    check_compatible,
    check_merge,
    leave_starts,
    merge_layers,
    module_to_keep,
    partly_merged,
    unmerge_layers,
    warn_of_requantization,
)
from nbpeft.engine.tree.adapted_tree import AdaptedTree
from nbpeft.engine.tree.model_tree import MANAGER
from nbpeft.engine.tree.tied_weights import untie_embeddings_
from nbpeft.engine.wrappers.extension import on_models


def unload(manager: Any, *, merge: bool, names: Sequence[str] | None, safe: bool, change: Transaction) -> None:
    """Removes all adapters permanently; call it inside a transaction.

    Args:
        manager: the model's manager, unusable afterwards.
        merge: merge the deltas first.
        names: adapters to merge; None for the active ones.
        safe: raise an error if a merged weight is not finite.
        change: records what is written.

    Raises:
        MergeError: a weight does not support merging, or a merged weight is not finite (``safe``).
        BusyError: a block of ``use`` or ``disabled`` is open.
    """
    manager.check_alive()
    manager.layer_commands.apply_pending(change)
    chosen: tuple[str, ...] = ()
    model, layers, merged = manager.model, manager.layers, manager.merged
    if merge:
        chosen = manager.active if names is None else names_in(names)
        manager.require(*chosen)
        check_compatible(manager.copies, layers, chosen)
        if not merged:
            check_merge(layers, chosen, manager.scale, safe=safe)
            warn_of_requantization(layers, chosen)
    manager._refuse_in_scopes("unloading")
    manager._keep_structure(change)
    if merged and (safe or set(merged) != set(chosen) or partly_merged(layers, merged)):
        unmerge_layers(layers.values(), change)
        manager._merged = merged = ()
        if merge:
            check_merge(layers, chosen, manager.scale, safe=safe)
    if merge and not merged:
        merge_layers(model, layers, chosen, manager.scale, change, keep_frozen=False)
    left = leave_starts(model, layers, manager.configs, chosen, change)
    _take_out(manager, chosen, change)
    if merge or left:
        untie_embeddings_(model, change)


def _take_out(manager: Any, merged: Sequence[str], change: Transaction) -> None:
    """Puts the frozen layers back in place of their wrappers, and ends the manager.

    Args:
        manager: the model's manager.
        merged: the adapters whose deltas and copies of modules stay in the model.
        change: records what is written.
    """
    model, biases = manager.model, manager.biases
    for name in manager.configs:
        if name in merged:
            biases.forget(name)
        else:
            biases.stop(name, change)
    replacements: dict[int, nn.Module] = {id(layer): layer.base_layer for layer in manager.layers.values()}
    replacements.update({id(module): module_to_keep(module, merged) for module in manager.copies.values()})
    replace_modules(model, replacements, change, merged=bool(merged), release=True)
    change.set_requires_grad(manager._was_trainable, True)
    change.keep_attributes(manager, "_configs")
    change.keep_attributes(model, MANAGER, *on_models)
    manager.alive = False
    manager._tree, manager._configs, manager._slots = AdaptedTree(), ByName(), {}
    manager._was_trainable, manager._selected, manager._merged, manager.unsaved = [], (), (), set()
    manager.active_state.publish(NO_ADAPTERS)
    for attribute in (MANAGER, *on_models):
        model.__dict__.pop(attribute, None)
