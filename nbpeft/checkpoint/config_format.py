"""Reads and writes ``adapter_config.json`` in PEFT's format."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from torch import nn

import nbpeft.engine.methods  # noqa: F401  (registers the methods)
from nbpeft.engine.config.targets import condensed_if_many
from nbpeft.engine.contract import registry
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.errors import ConfigError, CorruptCheckpointError, UntypedConfigError, in_one_line, shown
from nbpeft.names import PEFT_VERSION

LARGEST_CONFIG = 8_000_000
"""Largest config file in bytes; a config that names 50,000 modules takes a third of it."""
_MOST_ENTRIES = 150_000
"""Largest number of entries of all its lists and dictionaries together."""
_DEEPEST = 32
_MOST_DIGITS = 400
"""Most digits of an integer; more would not fit into the largest float."""

_RUNTIME_FIELDS = frozenset({"runtime_config"})


def config_text(config: AdapterConfig, *, inference_mode: bool | None = None) -> str:
    """Returns the text of ``adapter_config.json``.

    Args:
        config: any registered config.
        inference_mode: value to write instead of the config's own; PEFT saves adapters with True.

    Raises:
        ConfigError: a field's value cannot be written as JSON.
    """
    fields = {name: _plain(value) for name, value in config.to_dict().items() if name not in _RUNTIME_FIELDS}
    if inference_mode is not None:
        fields["inference_mode"] = inference_mode
    fields["peft_version"] = fields.get("peft_version") or PEFT_VERSION
    for name, value in fields.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} = {shown(value)} cannot be saved: {error}", field=name) from None
    return json.dumps(fields, indent=2, sort_keys=True)


def parse_config(text: str, where: str = "adapter_config.json") -> tuple[AdapterConfig, dict[str, Any]]:
    """Parses the text of an ``adapter_config.json``.

    Args:
        text: the JSON text.
        where: name of the file, for messages.

    Returns:
        The config, and the fields that this version does not know.

    Raises:
        CorruptCheckpointError: the text is not JSON, exceeds the size limits or has no ``peft_type``.
        UnknownMethodError: ``peft_type`` is not registered.
        ConfigError: a field has an invalid value.
    """
    try:
        fields = json.loads(text, parse_int=_whole_number)
        _check_size(fields)
    except json.JSONDecodeError as error:
        raise CorruptCheckpointError(f"{where} is not valid JSON: {error}", path=where) from None
    except (_BeyondBounds, RecursionError) as error:
        reason = str(error) if isinstance(error, _BeyondBounds) else "it is nested too deeply"
        raise CorruptCheckpointError(f"{where} is not the config of an adapter: {reason}", path=where) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise UntypedConfigError(f"{where} has no 'peft_type': it is not the config of an adapter", path=where)
    return config_of(fields, where)


class _BeyondBounds(Exception):
    """A config exceeds the limits on size, depth or digits."""


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _BeyondBounds(f"it contains a number of {len(digits):,} digits")
    return int(digits)


def _check_size(fields: Any) -> None:
    """Raises _BeyondBounds for JSON that is so large or so deep that processing it would take long."""
    level, entries, depth = [fields], 0, 0
    while level:
        level = [
            item
            for group in level
            if isinstance(group, dict | list)
            for item in (group.values() if isinstance(group, dict) else group)
        ]
        entries, depth = entries + len(level), depth + 1
        if entries > _MOST_ENTRIES:
            raise _BeyondBounds(f"it has more than {_MOST_ENTRIES:,} entries")
        if depth > _DEEPEST:
            raise _BeyondBounds("it is nested too deeply")


def config_of(fields: Mapping[str, Any], where: str) -> tuple[AdapterConfig, dict[str, Any]]:
    """Builds a config from the fields of a file.

    Args:
        fields: field -> value, with ``peft_type``.
        where: name of the file, for messages.

    Returns:
        The config, and the fields that this version does not know.

    Raises:
        UnknownMethodError: ``peft_type`` is not registered.
        ConfigError: a field has an invalid value.
    """
    config_class = registry.config_class_of(str(getattr(fields["peft_type"], "value", fields["peft_type"])))
    known = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = {name: value for name, value in fields.items() if name not in known and name not in _RUNTIME_FIELDS}
    given = {
        name: value
        for name, value in fields.items()
        if name in known and known[name].init and name not in _RUNTIME_FIELDS
    }
    try:
        return config_class(**given), unknown
    except ConfigError as error:
        raise type(error)(f"{where}: {error.message}", **error.details) from None
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where} has an invalid value: {in_one_line(error)}", path=where) from None


def config_to_save(config: AdapterConfig, model: nn.Module, *, targets: Iterable[str] | None = None) -> AdapterConfig:
    """Returns a copy of a config with the fields that PEFT fills in from the model when it saves.

    Sets ``base_model_name_or_path`` if it is None, and ``auto_mapping`` if there is no ``task_type``.
    Replaces ``target_modules="all-linear"`` by the module paths, and condenses a long list.

    Args:
        config: the adapter's config.
        model: the base model, with or without adapters.
        targets: paths of the adapted modules, which replace ``"all-linear"``; None leaves it.
    """
    changes: dict[str, Any] = {}
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = model.__dict__.get("name_or_path") or None
    if config.task_type is None:
        base = type(model)
        changes["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    wanted = getattr(config, "target_modules", None)
    if wanted == "all-linear" and targets is not None:
        wanted = changes["target_modules"] = set(targets)
    if config.condenses_targets:
        condensed = condensed_if_many(wanted, (name for name, _ in bare_modules(model, repeat=True) if name))
        if condensed is not wanted:
            changes["target_modules"] = condensed
    return config.copy(**changes)


def _plain(value: Any) -> Any:
    """Returns a value in JSON types; sets are sorted, so that equal configs give equal text."""
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, PurePath) else value
