"""The class of PEFT's tuner classes: what scripts put there is called for each target, or refused."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from nbpeft.engine.injection.redirects import set_redirect
from nbpeft.engine.tree.model_tree import Site
from nbpeft.errors import NotSupportedError
from nbpeft.names import DEFAULT_ADAPTER

_NOT_CALLED = frozenset(
    (
        *("_check_new_adapter_config", "_check_target_module_exists", "_create_new_module"),
        *("_mark_only_adapters_as_trainable", "_pre_injection_hook", "_prepare_adapter_config", "_prepare_model"),
        *("_replace_module", "_unload_and_optionally_merge"),
    )
)


PUTS = "_create_and_replace"
"""The function that is called for each target, and can be replaced by one that passes on to it."""


class TunerType(type):
    """Metaclass of ``BaseTuner``: its classes lack the functions that nothing here would call.

    A ``_create_and_replace`` that a script puts on one of them is asked for each target of the class's methods: it
    passes the target on to the former function, or another module of the model, or nothing.
    """

    def __getattr__(cls, name: str) -> Any:
        if name in _NOT_CALLED:
            raise AttributeError(_reason(cls, name))
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    def __setattr__(cls, name: str, value: object) -> None:
        if name in _NOT_CALLED:
            raise NotSupportedError(_reason(cls, name), name=name)
        super().__setattr__(name, value)
        if name == PUTS:
            is_own = value is getattr(cls.__mro__[1], PUTS, None)
            set_redirect(cls, None if is_own else functools.partial(_redirect, cls))

    def __delattr__(cls, name: str) -> None:
        super().__delattr__(name)
        if name == PUTS:
            set_redirect(cls, None)


def _redirect(cls: Any, model: nn.Module, config: Any, name: str | None, site: Site) -> nn.Module | None:
    """Returns the module that a class's ``_create_and_replace`` passes on; None if it passes none on.

    Raises:
        NotSupportedError: it puts a module into the model itself.
    """
    if config.peft_type != cls.tuned_type:
        return site.module
    tuner = cls.__new__(cls)
    nn.Module.__init__(tuner)
    tuner.__dict__.update(_modules={"model": model}, passed_on=[])
    present = site.parent._modules.get(site.attribute)
    getattr(cls, PUTS)(
        tuner, config, name or DEFAULT_ADAPTER, present, site.attribute, site.parent, current_key=site.path
    )
    if site.parent._modules.get(site.attribute) is not present:
        site.parent._modules[site.attribute] = present
        raise NotSupportedError(_reason(cls, PUTS), name=PUTS)
    passed = tuner.passed_on[0] if tuner.passed_on else None
    return site.module if passed is present else passed


def check_overrides(cls: type) -> None:
    """Raises NotSupportedError if a class derived from a tuner overrides a function that nothing here would call."""
    for parent in cls.__mro__:
        own = {PUTS} if "tuned_type" not in vars(parent) else set()  # a script may put it on PEFT's classes
        found = min((_NOT_CALLED | own) & vars(parent).keys(), default=None)
        if found is not None:
            raise NotSupportedError(_reason(parent, found), name=found)


def _reason(cls: type, name: str) -> str:
    return (
        f"{cls.__name__}.{name} would never be called, because nbpeft puts in layers in another way: register layer "
        "classes of your own with config._register_custom_module, or name other target_modules"
    )
