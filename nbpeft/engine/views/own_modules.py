"""Modules that adapters own, by adapter name, where PEFT has them in the tree: ``base_model.core["default"]``.

Unlike the modules of ``part_modules``, these are the adapters' own, which compute when the adapters do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbpeft.engine.contract.shared_state import SharedState
from nbpeft.engine.views.part_modules import AdapterDict, BufferMapping
from nbpeft.errors import AdapterError

Owners = Mapping[str, dict[str, Any]]
"""Adapter name -> the ``_modules`` that contain its module."""


class _Modules(dict[str, Any]):
    """The modules of a name; assigning one replaces the adapter's."""

    def __setitem__(self, name: str, module: Any) -> None:
        owners, own = self.__dict__.get("owners", ({name: {}}, ""))  # missing while unpickling
        if name not in owners:
            raise AdapterError(f"there is no adapter {name!r} with this module: add it with add_adapter() first")
        owners[name][own] = module
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        raise AdapterError(f"a part of adapter {name!r} cannot be taken out: delete_adapter() removes the adapter")


class OwnModules(AdapterDict):
    """Modules of adapters by adapter name."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_modules"] = _Modules()

    def set_owners(self, owners: Owners, own: str) -> None:
        """Sets the modules that are shown.

        Args:
            owners: adapter name -> the ``_modules`` that contain its module.
            own: name of the module there.
        """
        modules: Any = self._modules
        modules.__dict__["owners"] = (owners, own)
        _update(modules, {name: modules[own] for name, modules in owners.items()})


class OwnBuffers(AdapterDict):
    """Buffers of the states that layers share: name of the buffer -> adapter name -> buffer."""

    def set_states(self, states: Mapping[str, SharedState], own: str) -> None:
        """Sets the buffers that are shown.

        Args:
            states: adapter name -> the state that its layers share.
            own: name of the module in the states that has the buffers.
        """
        owners: dict[str, Any] = {name: state._modules[own] for name, state in states.items()}
        keys = dict.fromkeys(key for module in owners.values() for key in module._buffers)
        former: dict[str, Any] = dict(self._modules)
        mappings: dict[str, BufferMapping] = {key: former.get(key) or BufferMapping() for key in keys}
        for key, mapping in mappings.items():
            mapping.show(owners, key)
        _update(self._modules, mappings)


def _update(shown: dict[str, Any], modules: Mapping[str, Any]) -> None:
    """Replaces the content of a dictionary, unless it is the same: other code may be iterating over it."""
    if [*shown.items()] != [*modules.items()]:
        shown.clear()
        shown.update(modules)


def show_all(shown: dict[str, Any], owners: Mapping[str, Owners]) -> None:
    """Updates the modules of adapters in a place of the tree; those of absent adapters become empty.

    Args:
        shown: ``_modules`` of the place, changed in place.
        owners: name of the modules -> ``Owners``.
    """
    present = {own for own, module in shown.items() if isinstance(module, OwnModules)}
    for own in dict.fromkeys((*owners, *present)):
        if own not in present:
            shown[own] = OwnModules()
        shown[own].set_owners(owners.get(own, {}), own)
