"""Modules that PEFT keeps on ``base_model`` and not in the layers: ``base_model.shadow_backbone["default"]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbpeft.engine.changes.called_modules import outside
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.views.own_modules import OwnBuffers, show_all


def list_parts(manager: AdapterManager, names: Sequence[str], modules: dict[str, Any]) -> None:
    """Lists modules of adapters, or of the states that their layers share, as those of a tuner.

    Args:
        manager: manager of the model.
        names: names of the modules (``PeftNames.on_model``).
        modules: ``_modules`` of the tuner, changed in place.
    """
    if not names or not manager.alive:
        return
    adapters = [
        (layer, name, adapter)
        for layer in manager.layers.values()
        for name, adapter in layer.adapters._modules.items()
        if adapter is not None and adapter.peft.on_model  # type: ignore[union-attr]
    ]
    layers = {id(layer): layer for layer, *_ in adapters}.values()
    known = outside(manager.model)
    moved = [one for one in layers if not one.parts_listed_apart or one.is_outside != (str(id(one)) in known)]
    if moved:
        with manager.transaction(during_calls=True, quiet=True) as change:
            manager.layer_commands.list_apart(moved, change, apart=True, parts=True)
    owners = {
        own: {name: adapter._modules for _, name, adapter in adapters if own in adapter._modules} for own in names
    }
    states = {name: state for name in manager.configs if (state := manager.shared(name)) is not None}
    for own in names:
        with_buffers = {name: state for name, state in states.items() if own in state._modules}
        if with_buffers:
            modules.setdefault(own, OwnBuffers()).set_states(with_buffers, own)
    show_all(modules, {own: by_name for own, by_name in owners.items() if not isinstance(modules.get(own), OwnBuffers)})
