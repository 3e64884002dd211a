"""Tensors that the layers of an adapter share, under PEFT's names: ``base_model.vera_A["default"]``."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from nbpeft.engine.views.layer_attributes import PerAdapterView


def shared_by_name(states: dict[str, Any], name: str) -> PerAdapterView | None:
    """Returns the shared tensors of a name.

    Args:
        states: adapter name -> the state that its layers share.
        name: name of a tensor, such as ``vera_A``.

    Returns:
        Adapter name -> tensor; None if no adapter has the name.
    """
    having = {
        adapter: state
        for adapter, state in states.items()
        if name in state._parameters or name in state._buffers or name in state._modules
    }
    found = PerAdapterView(having, name, attrgetter(name), lambda state, value: attrgetter(name)(state).copy_(value))
    return found if found and name.isidentifier() else None
