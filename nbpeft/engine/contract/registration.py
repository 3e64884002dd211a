"""Checks what the author of a method passes to ``register``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.capabilities import (
    HasFixedTensors,
    HasInnerAdapters,
    HotSwaps,
    MeasuresDelta,
    MergesInPlace,
    Paddable,
    QuantizationAware,
    ShowsModules,
    TiedAdapter,
    WeightInitialized,
)
from nbpeft.errors import ConfigError, did_you_mean, shown

_HOME = HotSwaps.__module__
_CAPABILITIES = (
    *(HasFixedTensors, HasInnerAdapters, HotSwaps, MeasuresDelta, MergesInPlace),
    *(QuantizationAware, ShowsModules, WeightInitialized, TiedAdapter),
)
"""Capabilities whose members only count in classes that derive from them."""


def check_fields(label: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses keywords that ``register`` does not take.

    Args:
        label: label of the method.
        given: the keywords that were passed.
        known: the keywords that it takes.

    Raises:
        ConfigError: a keyword is unknown; names the nearest known one.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"{label}: register() takes no {name}.{did_you_mean(name, known)}", field=name)


def check_classes(label: str, adapter_class: type[Any]) -> None:
    """Refuses an adapter class that overrides a member of a capability without deriving from the capability.

    Args:
        label: label of the method.
        adapter_class: class of its adapters.

    Raises:
        ConfigError: the member would have no effect.
    """
    for cls in adapter_class.__mro__:
        _check_capabilities(label, adapter_class, cls)


def _check_capabilities(label: str, adapter_class: type[Any], cls: type[Any]) -> None:
    """Refuses a class that overrides a member of a capability without deriving from the capability."""
    for capability in _CAPABILITIES:
        if issubclass(adapter_class, capability) or cls.__module__ == _HOME:  # a capability itself
            continue
        taken = vars(Paddable) if issubclass(adapter_class, Paddable) else {}
        members = (name for name in vars(capability) if not name.startswith("_") and name not in taken)
        name = next((name for name in members if name in vars(cls)), None)
        if name is not None:
            raise ConfigError(
                f"{label}: {cls.__name__}.{name} has no effect unless the class derives from "
                f"{capability.__module__}.{capability.__name__}",
                field=name,
            )


def check_values(label: str, given: Mapping[str, Any], records: Mapping[str, type[Any]]) -> None:
    """Checks the types of the optional arguments of ``register``.

    Args:
        label: label of the method.
        given: the arguments.
        records: argument -> class of its value, for those that take a record.

    Raises:
        ConfigError: the type of a value is wrong.
    """
    for name, record in records.items():
        if not isinstance(given.get(name, record()), record):
            message = f"{label}: {name} must be a {record.__name__}, not {shown(given[name])}"
            raise ConfigError(message, field=name)
    for name, takes in (("default_targets", "model type"), ("applies", "config")):
        if not callable(given.get(name, callable)):
            raise ConfigError(
                f"{label}: {name} must be a function of the {takes}, not {shown(given[name])}", field=name
            )
    samples = given.get("sample_configs", {})
    if not isinstance(samples, Mapping) or not all(isinstance(fields, Mapping) for fields in samples.values()):
        message = f"{label}: sample_configs must map names to the fields of a config, not {shown(samples)}"
        raise ConfigError(message, field="sample_configs")


def check_peft_type(label: str, peft_type: object, config_class: type[Any], taken: Mapping[str, type[Any]]) -> None:
    """Checks the name that a method has in files and for ``--method``.

    Args:
        label: label of the method.
        peft_type: the name.
        config_class: class of its configs.
        taken: name -> config class of the registered methods.

    Raises:
        ConfigError: it is no upper-case name, or the configs of another method have it.
    """
    if not isinstance(peft_type, str) or not peft_type.isidentifier() or not peft_type.isupper():
        raise ConfigError(
            f"{label}: peft_type must be a name in upper case, such as 'MY_METHOD', not {shown(peft_type)}",
            field="peft_type",
        )
    other = taken.get(peft_type, config_class)
    related = issubclass(config_class, other) or issubclass(other, config_class)
    if not related and other.__qualname__ != config_class.__qualname__:
        raise ConfigError(
            f"{label}: peft_type {peft_type!r} is that of {other.__name__} in {other.__module__}: files would not say "
            "which method is meant; choose another",
            field="peft_type",
        )


def check_config_class(label: str, config_class: type[Any], samples: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks the fields that a config declares.

    Args:
        label: label of the method.
        config_class: class of its configs.
        samples: name -> fields of a config.

    Raises:
        ConfigError: the class is no dataclass, a field has the name of a member of all configs, or a sample has a
            field that does not exist.
    """
    own = [name for name, kind in vars(config_class).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
    if own and "__dataclass_fields__" not in vars(config_class):
        raise ConfigError(
            f"{label}: {config_class.__name__} has fields ({', '.join(own)}) but is no dataclass: write @dataclass "
            "above it"
        )
    fields = [field.name for field in dataclasses.fields(config_class)]
    common = {field.name for field in dataclasses.fields(AdapterConfig)}
    for name in fields:
        if name not in common and hasattr(AdapterConfig, name):
            raise ConfigError(
                f"{label}: {config_class.__name__} cannot have a field {name!r}, because all configs have a member of "
                "that name; choose another",
                field=name,
            )
    for sample, values in samples.items():
        unknown = next((name for name in values if name not in fields), None)
        if unknown is not None:
            hint = did_you_mean(unknown, fields)
            raise ConfigError(
                f"{label}: sample_configs[{sample!r}]: {config_class.__name__} has no field {unknown!r}.{hint}",
                field="sample_configs",
            )
