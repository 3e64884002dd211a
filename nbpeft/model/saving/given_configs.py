"""The config objects that people give: as in PEFT an adapter has the very object, filled in.

In PEFT a config that is given to a second model has the first one's targets: ``"all-linear"`` on a model of two layers
has become a list of the modules of two layers. Here the second model gets a copy of what was given; where the object is
given for loading a saved adapter, the one that is loaded has it, and the first keeps a copy.
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig, is_of_an_adapter
from nbpeft.engine.contract.training_hooks import HasTrainingState
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import takes_part


class _Filled(NamedTuple):
    """A config that an adapter has: the object, as it was given, as it was filled in, and whose it is."""

    reference: weakref.ref[AdapterConfig]
    given: AdapterConfig
    filled: AdapterConfig
    manager: weakref.ref[AdapterManager]


_filled: dict[int, _Filled] = {}
"""id of such a config -> what is known of it."""


def as_given(config: AdapterConfig) -> AdapterConfig:
    """Returns a config as a person means it: without what a model has filled in, with what was set since.

    Args:
        config: the object; it is returned itself where no adapter has had it.
    """
    known = _known(config)
    if known is None:
        return config
    own = takes_part(config, HasTrainingState)  # whose patterns are what training has made of them
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    kept = {name: value for name, value in public.items() if value != getattr(known.filled, name, None)}
    return known.given.copy(**{name: value for name, value in kept.items() if not (own and isinstance(value, dict))})


def take_given(
    manager: AdapterManager, name: str, given: AdapterConfig, change: Transaction, *, loading: bool = False
) -> None:
    """Lets an adapter have the object that its config was given as, filled in; one that an adapter has had stays as is.

    Args:
        manager: has the adapter.
        name: of the adapter.
        given: the object, before anything was filled in.
        change: records it.
        loading: the object is given for a saved adapter: one that another adapter has goes over to this one.
    """
    if is_of_an_adapter(given):
        known = _known(given)
        if known is None or not loading:
            return
        if (owner := known.manager()) is not None:
            for other in [one for one, config in owner.configs.items() if config is given]:
                _put(owner, other, given.copy(), change)
    key, before, made = id(given), as_given(given).copy(), manager.configs[name]
    change.keep(vars(given))
    filled = made.copy()
    vars(given).update(vars(made))  # the very values: adapters share the patterns among them

    def forget(_: object = None) -> None:
        _filled.pop(key, None)

    former = _filled.get(key)
    change.on_undo(forget if former is None else functools.partial(_filled.__setitem__, key, former))
    _filled[key] = _Filled(weakref.ref(given, forget), before, filled, weakref.ref(manager))
    _put(manager, name, given, change)


def _known(config: AdapterConfig) -> _Filled | None:
    found = _filled.get(id(config))
    return found if found is not None and found.reference() is config else None


def _put(manager: AdapterManager, name: str, config: AdapterConfig, change: Transaction) -> None:
    """Lets an adapter have another object as its config."""
    made = manager.configs[name]
    change.set_item(manager.configs, name, config)
    shared = manager.shared(name)
    for module in () if shared is None else shared.modules():  # who sets a field of the object later means them, too
        if vars(module).get("config") is made:
            change.keep_attributes(module, "config")
            vars(module)["config"] = config
