"""Tensors that the layers of an adapter share, under PEFT's names: ``base_model.vera_A["default"]``."""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import Any

from nbpeft.engine.views.layer_attributes import PerAdapterView


def shared_by_name(states: dict[str, Any], name: str) -> PerAdapterView | dict[str, PerAdapterView] | None:
    """Returns the shared tensors of a name.

    Args:
        states: adapter name -> the state that its layers share.
        name: name of a tensor, such as ``vera_A``, or of a module in ``SharedState.named_first``.

    Returns:
        Adapter name -> tensor; for a module, name of a buffer -> such a mapping; None if no adapter has the name.
    """
    holders = {own: state._modules[name] for own, state in states.items() if name in state.named_first}
    if holders:
        keys = dict.fromkeys(key for holder in holders.values() for key in holder._buffers)
        return {key: PerAdapterView(holders, key, itemgetter(key)) for key in keys}
    having = {
        adapter: state
        for adapter, state in states.items()
        if name in state._parameters or name in state._buffers or name in state._modules
    }
    found = PerAdapterView(having, name, attrgetter(name), lambda state, value: attrgetter(name)(state).copy_(value))
    return found if found and name.isidentifier() else None
