"""The config objects that people give: as in PEFT an adapter has the very object, filled in.

In PEFT a config that is given to a second model has the first one's targets: ``"all-linear"`` on a model of two layers
has become a list of the modules of two layers. Here the second model gets a copy of what was given.
"""

from __future__ import annotations

import weakref

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig, is_of_an_adapter
from nbpeft.engine.contract.training_hooks import HasTrainingState
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import takes_part

_filled: dict[int, tuple[weakref.ref[AdapterConfig], AdapterConfig, AdapterConfig]] = {}
"""id of a config that an adapter has -> the object, as it was given, as it was filled in."""


def as_given(config: AdapterConfig) -> AdapterConfig:
    """Returns a config as a person means it: without what a model has filled in, with what was set since.

    Args:
        config: the object; it is returned itself where no adapter has had it.
    """
    reference, given, filled = _filled.get(id(config), (None, config, config))
    if reference is None or reference() is not config:
        return config
    own = takes_part(config, HasTrainingState)  # whose patterns are what training has made of them
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    kept = {name: value for name, value in public.items() if value != getattr(filled, name, None)}
    return given.copy(**{name: value for name, value in kept.items() if not (own and isinstance(value, dict))})


def take_given(manager: AdapterManager, name: str, given: AdapterConfig, change: Transaction) -> None:
    """Lets an adapter have the object that its config was given as, filled in; one that an adapter has had stays as is.

    Args:
        manager: has the adapter.
        name: of the adapter.
        given: the object, before anything was filled in.
        change: records it.
    """
    if is_of_an_adapter(given):
        return
    key, before, made = id(given), given.copy(), manager.configs[name]
    change.keep(vars(given))
    filled = made.copy()
    vars(given).update(vars(made))  # the very values: adapters share the patterns among them

    def forget(_: object = None) -> None:
        _filled.pop(key, None)

    change.on_undo(forget)
    _filled[key] = weakref.ref(given, forget), before, filled
    change.set_item(manager.configs, name, given)
    shared = manager.shared(name)
    for module in () if shared is None else shared.modules():  # who sets a field of the object later means them, too
        if vars(module).get("config") is made:
            change.keep_attributes(module, "config")
            vars(module)["config"] = given
