"""Users' config objects: as in PEFT the adapter's config is the same object, with added values.

In PEFT a config that is used for a second model has the first model's targets: ``"all-linear"`` on a model with two
layers has become a list of these layers' modules. Here the second model gets a copy of the config as the user created
it. If the object is passed when loading a saved adapter, that adapter gets the object and the first one a copy.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig, is_of_an_adapter
from nbpeft.engine.contract.training_hooks import HasTrainingState
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import takes_part
from nbpeft.errors import ConfigError, few, shown, with_article


class _Filled(NamedTuple):
    """A config object of an adapter: as the user created it, with the added values, and the manager that has it."""

    reference: weakref.ref[AdapterConfig]
    given: AdapterConfig
    filled: AdapterConfig
    manager: weakref.ref[AdapterManager]


_filled: dict[int, _Filled] = {}
"""id of a config object -> its record."""


def user_config(config: AdapterConfig) -> AdapterConfig:
    """Returns a config as the user means it: without values that a model has added, but with the user's later changes.

    Args:
        config: the config object; returned itself if it is not the config of an adapter.
    """
    known = _known(config)
    if known is None:
        return config
    own = takes_part(config, HasTrainingState)  # such methods change the config's patterns during training
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    changed = {name: value for name, value in public.items() if value != getattr(known.filled, name, None)}
    return known.given.copy(**{name: value for name, value in changed.items() if not (own and isinstance(value, dict))})


def adopt_config(
    manager: AdapterManager, name: str, given: AdapterConfig, change: Transaction, *, loading: bool = False
) -> None:
    """Makes the user's config object the config of an adapter, with the added values; a used object is not changed.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        given: the user's config object.
        change: transaction that records the change.
        loading: the object was passed for loading a saved adapter; another adapter that has it gets a copy instead.
    """
    if is_of_an_adapter(given):
        known = _known(given)
        if known is None or not loading:
            return
        if (owner := known.manager()) is not None:
            for other in [other for other, config in owner.configs.items() if config is given]:
                _put(owner, other, given.copy(), change)
    key, before, completed = id(given), user_config(given).copy(), manager.configs[name]
    change.keep(vars(given))
    filled = completed.copy()
    vars(given).update(vars(completed))  # not copies: adapters share the patterns

    def forget(_: object = None) -> None:
        _filled.pop(key, None)

    former = _filled.get(key)
    change.on_undo(forget if former is None else functools.partial(_filled.__setitem__, key, former))
    _filled[key] = _Filled(weakref.ref(given, forget), before, filled, weakref.ref(manager))
    _put(manager, name, given, change)


def replace_configs(manager: AdapterManager, configs: Mapping[str, AdapterConfig]) -> None:
    """Replaces the config objects of all adapters, as scripts do by assigning ``peft_config``; changes no tensor.

    Args:
        manager: manager of the model.
        configs: adapter name -> its new config, of the method it has.

    Raises:
        ConfigError: the names are not those of the adapters, or a config is of another method; nothing is changed.
    """
    if not isinstance(configs, Mapping) or configs.keys() != {*manager.names}:
        given = f"one with {few(list(map(str, configs))) or 'none'}" if isinstance(configs, Mapping) else shown(configs)
        raise ConfigError(
            f"peft_config must be a dictionary with a config for {few(manager.names)}, not {given}: add_adapter() and "
            "delete_adapter() change which adapters there are"
        )
    with manager.transaction() as change:
        for name, config in configs.items():
            former = manager.configs[name]
            if not isinstance(config, AdapterConfig) or config.peft_type != former.peft_type:
                kind = type(former).__name__
                raise ConfigError(f"adapter {name!r} has a {kind}: its config cannot be {with_article(config)}")
            _put(manager, name, config, change)


def _known(config: AdapterConfig) -> _Filled | None:
    found = _filled.get(id(config))
    return found if found is not None and found.reference() is config else None


def _put(manager: AdapterManager, name: str, config: AdapterConfig, change: Transaction) -> None:
    """Replaces the config object of an adapter."""
    former = manager.configs[name]
    change.set_item(manager.configs, name, config)
    shared = manager.shared(name)
    for module in () if shared is None else shared.modules():  # changes of the object must reach them too
        if vars(module).get("config") is former:
            change.keep_attributes(module, "config")
            vars(module)["config"] = config
