"""The names of an adapter's parameters below a layer and below the model, as in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.capabilities import inner_adapters_of
from nbpeft.engine.contract.model_adapter import HasSideNetwork
from nbpeft.engine.contract.shared_state import SharedState, state_of_all


def shown_name(adapter: Adapter, own: str, name: str) -> str:
    """Returns the name of a parameter below an adapted layer.

    Args:
        adapter: the adapter.
        own: the adapter's name of the parameter.
        name: name of the adapter.
    """
    listed, _, number = own.partition(".")
    if listed in adapter.peft.lists:
        return f"{listed}.{name}.{number}{'.weight' if listed in adapter.peft.wrapped else ''}"
    if own in adapter.peft.grouped:
        group, _, part = adapter.peft.grouped[own].partition(".")
        return f"{group}.{name}.{part}"
    inner = inner_adapters_of(adapter)
    if listed in inner:
        return shown_name(inner[listed], number, listed)
    if "." in own:  # a parameter of a module inside the adapter
        return f"{adapter.peft.shown_as}.{name}.{own}"
    for wrapped in (own, own.removesuffix("_bias")):
        if wrapped in adapter.peft.wrapped:
            return f"{wrapped}.{name}.{adapter.peft.names_in_modules.get(own, 'weight') if wrapped == own else 'bias'}"
    return ".".join(filter(None, (adapter.peft.container, own, name)))


def name_on_model(network: HasSideNetwork, own: str, name: str) -> str:
    """Returns the name of a parameter of a side network, whose modules are on the model or around its blocks.

    Args:
        network: the adapter.
        own: the adapter's name of the parameter.
        name: name of the adapter.

    Returns:
        The name below ``base_model`` or the base model, whichever has the module.
    """
    place = next((place for place in network.places if own.startswith(f"{place}.")), "")
    part, _, rest = own.removeprefix(f"{place}.").partition(".")
    return ".".join(filter(None, (place, part, name, rest)))


def shared_here(adapters: Mapping[str, Any]) -> dict[str, SharedState]:
    """Adapter name -> the state that its layers share, for states that this layer has and that PEFT's layers list."""
    states = {name: state_of_all(adapter) for name, adapter in adapters.items()}
    return {name: one for name, one in states.items() if one and adapters[name]._modules.get("shared") is one}
