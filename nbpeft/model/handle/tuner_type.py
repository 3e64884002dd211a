"""The class of PEFT's tuner classes: refuses scripts that replace what puts in PEFT's layers."""

from __future__ import annotations

from typing import Any

from nbpeft.errors import NotSupportedError

_NOT_CALLED = frozenset(
    (
        *("_check_new_adapter_config", "_check_target_module_exists", "_create_and_replace", "_create_new_module"),
        *("_mark_only_adapters_as_trainable", "_pre_injection_hook", "_prepare_adapter_config", "_prepare_model"),
        *("_replace_module", "_unload_and_optionally_merge"),
    )
)


class TunerType(type):
    """Metaclass of ``BaseTuner``: its classes lack the functions that nothing here would call."""

    def __getattr__(cls, name: str) -> Any:
        if name in _NOT_CALLED:
            raise AttributeError(_reason(cls, name))
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    def __setattr__(cls, name: str, value: object) -> None:
        if name in _NOT_CALLED:
            raise NotSupportedError(_reason(cls, name), name=name)
        super().__setattr__(name, value)


def check_overrides(cls: type) -> None:
    """Raises NotSupportedError if a class derived from a tuner overrides a function that nothing here would call."""
    for parent in cls.__mro__:
        found = min(_NOT_CALLED & vars(parent).keys(), default=None)
        if found is not None:
            raise NotSupportedError(_reason(parent, found), name=found)


def _reason(cls: type, name: str) -> str:
    return (
        f"{cls.__name__}.{name} would never be called, because nbpeft puts in layers in another way: register layer "
        "classes of your own with config._register_custom_module, or name other target_modules"
    )
