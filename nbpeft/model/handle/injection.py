"""``inject_adapter_in_model``: adapters on a model without a PeftModel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import manager_of, unwrapped
from nbpeft.errors import ConfigError, TargetError, few
from nbpeft.model.handle.state_dicts import drop_values
from nbpeft.model.saving.user_configs import adopt_config, user_config


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adds an adapter to a model without creating a PeftModel, and returns the model itself.

    Its parameters have the dtype of the base model, half precision too; those of a PeftModel are float32 by default.

    Args:
        peft_config: config of the adapter.
        model: the base model, changed in place.
        adapter_name: name of the adapter. An existing adapter with this name is replaced, with a warning.
        low_cpu_mem_usage: leave the parameters on the meta device, until ``set_peft_model_state_dict`` loads them.
        state_dict: the tensors of an adapter file. Its keys select the modules to adapt, instead of the config's
            ``target_modules``. Its values are ignored; load them with ``set_peft_model_state_dict``.

    Raises:
        ConfigError: the method changes calls of the model instead of layers, as learned prompts do.
        TargetError: neither the config nor any key fits the model, which is not changed.
    """
    if method_of(peft_config).transforms_calls:
        raise ConfigError(
            f"inject_adapter_in_model does not take {type(peft_config).__name__}, whose adapter changes calls of the "
            "model and not its layers: use get_peft_model"
        )
    manager = manager_of(model) or AdapterManager(unwrapped(model))
    with replacing(manager, adapter_name, "a new one") as replace, manager.transaction() as change:
        config = user_config(peft_config)
        inject(manager, config, adapter_name, empty=low_cpu_mem_usage, state_dict=state_dict, replace=replace)
        adopt_config(manager, adapter_name, peft_config, change)
    return model


@contextmanager
def replacing(manager: AdapterManager, name: str, new: str) -> Iterator[bool]:
    """Context manager for adding an adapter; warns afterwards if it replaced one of the same name, as PEFT does.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        new: description of the new adapter, for the warning.

    Yields:
        Whether there is an adapter with this name.
    """
    replaced, unsaved = name in manager.configs, name in manager.unsaved
    yield replaced
    if replaced:
        lost = "; its unsaved weights are lost" if unsaved else ""
        warnings.warn(f"the model already has an adapter {name!r}: {new} replaces it{lost}", stacklevel=4)


def inject(
    manager: AdapterManager,
    config: AdapterConfig,
    name: str,
    *,
    empty: bool,
    state_dict: Mapping[str, Tensor] | None,
    replace: bool = False,
    activate: bool = True,
) -> None:
    """Adds an adapter and activates it; see ``inject_adapter_in_model``.

    Args:
        manager: manager of the model.
        config: config of the adapter.
        name: name of the adapter.
        empty: leave the parameters on the meta device.
        state_dict: its keys select the modules to adapt; None for the config's targets.
        replace: replace an existing adapter with the same name.
        activate: False leaves the active adapters as they are.
    """
    plan = manager.plan(config) if state_dict is None else _plan_for_keys(manager, config, state_dict)
    modes: dict[str, Any] = {"trainable": not config.inference_mode, "half": True, "training": True, "draws": not empty}
    put = manager.prepare(name, plan, replace=replace, **modes)
    put_active(manager, put, name, empty=empty, activate=activate)


def put_active(
    manager: AdapterManager, put: Callable[[], object], name: str, *, empty: bool, activate: bool = True
) -> None:
    """Adds a prepared adapter to the model and activates it.

    Args:
        manager: manager of the model, which may not be attached yet.
        put: result of ``manager.prepare``; adds the adapter.
        name: name of the adapter.
        empty: leave the parameters on the meta device.
        activate: False leaves the active adapters as they are.
    """
    with manager.transaction():
        put()
        AdapterManager.attach(manager.model, manager)
        if activate and manager.active != (name,):
            manager.activate(name)
        if empty:
            drop_values(manager, name)


def _plan_for_keys(manager: AdapterManager, config: AdapterConfig, keys: Iterable[str]) -> InjectionPlan:
    """Returns the plan for the modules that keys name.

    A config that selects them is left as it is; if it selects others, its targets become those modules, with a warning.
    """
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
    plan = manager.plan(config.copy(target_modules=list(paths), **everywhere))
    try:
        selected = manager.plan(config)
    except TargetError:
        return plan
    differing = set(selected.paths) ^ set(plan.paths)
    if not differing:
        return selected
    if selected.paths:
        warnings.warn(
            f"the state_dict and the config select different modules ({few(sorted(differing), 3)}): "
            "those of the state_dict are adapted",
            RuntimeWarning,
            stacklevel=3,
        )
    return plan
