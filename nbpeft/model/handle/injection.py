"""Adapters on a model without a handle: ``inject_adapter_in_model``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.injection.plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import manager_of, unwrapped
from nbpeft.errors import ConfigError, TargetError, few
from nbpeft.model.handle.state_dicts import drop_values
from nbpeft.model.saving.given_configs import as_given, take_given


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adds an adapter to a model without a handle and returns the model itself.

    Args:
        peft_config: config of the adapter.
        model: the base model; changed in place.
        adapter_name: its name. An adapter that has it already is replaced, with a warning.
        low_cpu_mem_usage: leave its parameters on the meta device; ``set_peft_model_state_dict`` fills them in.
        state_dict: its keys, those of a file, say which modules to adapt, instead of the config's
            ``target_modules``; its values are not used, see ``set_peft_model_state_dict``.

    Raises:
        TargetError: the config, or no key, fits the model, which is as it was.
    """
    manager = manager_of(model) or AdapterManager(unwrapped(model))
    with replacing(manager, adapter_name, "a new one") as replace, manager.transaction() as change:
        config = as_given(peft_config)
        inject(manager, config, adapter_name, empty=low_cpu_mem_usage, state_dict=state_dict, replace=replace)
        take_given(manager, adapter_name, peft_config, change)
    return model


@contextmanager
def replacing(manager: AdapterManager, name: str, new: str) -> Iterator[bool]:
    """Context manager around the adding of an adapter: warns after it if one of its name was replaced, as PEFT does.

    Args:
        manager: of the model.
        name: of the adapter.
        new: what takes the place of another one.

    Yields:
        Whether there is one.
    """
    replaced, unsaved = name in manager.configs, name in manager.unsaved
    yield replaced
    if replaced:
        learned = ", and what it had learned since it was saved last is lost" if unsaved else ""
        warnings.warn(f"the model already carries an adapter {name!r}: {new} takes its place{learned}", stacklevel=4)


def inject(
    manager: AdapterManager,
    config: AdapterConfig,
    name: str,
    *,
    empty: bool,
    state_dict: Mapping[str, Tensor] | None,
    replace: bool = False,
) -> None:
    """Makes an adapter of a config and makes it the active one; see ``inject_adapter_in_model``.

    Args:
        manager: of the model.
        config: of the adapter.
        name: its name.
        empty: leave its parameters on the meta device.
        state_dict: its keys say which modules to adapt.
        replace: let it take the place of one with the same name.
    """
    plan = manager.plan(config) if state_dict is None else _plan_for_keys(manager, config, state_dict)
    put = manager.prepare(name, plan, trainable=not config.inference_mode, replace=replace, training=True)
    put_active(manager, put, name, empty=empty)


def put_active(manager: AdapterManager, put: Callable[[], object], name: str, *, empty: bool) -> None:
    """Puts a prepared adapter on the model and makes it the active one.

    Args:
        manager: of the model, which it need not know yet.
        put: what ``manager.prepare`` gave.
        name: the adapter's name.
        empty: leave its parameters on the meta device.
    """
    with manager.transaction():
        put()
        AdapterManager.attach(manager.model, manager)
        if manager.active != (name,):
            manager.activate(name)
        if empty:
            drop_values(manager, name)


def _plan_for_keys(manager: AdapterManager, config: AdapterConfig, keys: Iterable[str]) -> InjectionPlan:
    """A plan for the modules that keys name; warns where the config means others."""
    if getattr(config, "target_parameters", None):
        raise ConfigError(
            "the keys of a state_dict do not say which target_parameters they belong to: inject without state_dict and "
            "load it with set_peft_model_state_dict",
            field="target_parameters",
        )
    paths = checkpoint.adapted_paths(keys, method_of(config).peft_type)
    if not paths:
        raise TargetError("the state_dict has no key of an adapter of this config that says which modules to adapt")
    everywhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    made = manager.plan(config.copy(target_modules=list(paths), **everywhere))
    try:
        meant = set(manager.plan(config).paths)
    except TargetError:
        meant = set()
    differing = meant ^ set(made.paths)
    if meant and differing:
        warnings.warn(
            f"the state_dict and the config mean different modules ({few(sorted(differing), 3)}): "
            "those of the state_dict are adapted",
            RuntimeWarning,
            stacklevel=3,
        )
    return made
