"""Checks the fields of a config against their annotations.

``use_dora: "no"`` would be true and ``r: "8"`` a string: both are refused, in a file and in a
constructor. Numbers of NumPy and tensors of one number are converted to Python's. None always
passes here; whether a field needs a value is checked elsewhere.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Union

from torch import Tensor

from nbpeft.errors import ConfigTypeError, shown

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def check_types(config: Any, *, passing: Collection[str] = ()) -> None:
    """Checks that the type of each value fits the annotation of its field.

    Args:
        config: an instance of a dataclass; numbers of NumPy and torch in it are replaced with Python's.
        passing: names of fields that are not checked.

    Raises:
        ConfigTypeError: the type of a value does not fit; names the first such field.
    """
    config_class: Any = type(config)
    for name, kind in _annotations(config_class).items():
        value = getattr(config, name, None)
        if value is None or name in passing:
            continue
        as_plain = _plain_field(value)
        if not _fits(as_plain, kind):
            what, kind, wrong = _culprit(name, kind, as_plain)
            raise ConfigTypeError(f"{what} must be {_described(kind)}, not {shown(wrong)}", field=name, value=value)
        if as_plain is not value:
            setattr(config, name, as_plain)


def takes_none(config_class: Any, name: str) -> bool:
    """Whether the annotation of a field allows None, or is not known."""
    kind = _annotations(config_class).get(name, Any)
    return kind is Any or type(None) in typing.get_args(kind)


@functools.lru_cache(maxsize=64)
def _annotations(config_class: Any) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # a class of another package whose annotations cannot be resolved
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if kind is bool:
        return _is_bool(value)
    if kind is int:
        return isinstance(value, numbers.Integral) and not _is_bool(value)
    if kind is float:
        return isinstance(value, numbers.Real) and not _is_bool(value)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if origin is dict or kind is dict:
        keys, values = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    if isinstance(origin, type) and issubclass(origin, Collection):
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            return False
        # Items of an iterator are not checked: that would consume it.
        item = Any if origin is tuple else arguments[0]
        return not isinstance(value, Collection) or all(_fits(element, item) for element in value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return isinstance(value, str | kind)
    return kind is not type(None)


def _culprit(name: str, kind: Any, value: Any) -> tuple[str, Any, Any]:
    """Name, expected type and value of the part that does not fit: the field, or the first wrong entry of its dict."""
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        keys, values = typing.get_args(kind)
        for key, entry in value.items():
            if not _fits(key, keys):
                return f"a key of {name}", keys, key
            if not _fits(entry, values):
                return f"{name}[{shown(key)}]", values, entry
    return name, kind, value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def _plain_field(value: Any) -> Any:
    """Converts a number, or the numbers in a dictionary; diffusers gives the alphas of files as tensors."""
    if not isinstance(value, dict):
        return plain(value)
    converted = {key: plain(entry) for key, entry in value.items()}
    changed = any(converted[key] is not entry for key, entry in value.items())
    return converted if changed else value


def plain(value: Any) -> Any:
    """Converts a number of NumPy, or a tensor without dimensions, to Python's; returns everything else unchanged."""
    if isinstance(value, int | float | enum.Enum):
        return value
    if isinstance(value, Tensor):
        return value if value.ndim or value.is_meta else value.item()
    if _is_bool(value):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _described(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(_described(choice) for choice in arguments if choice is not type(None))
        return " or ".join(words)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is dict or kind is dict:
        return "a dictionary"
    if isinstance(origin, type) and issubclass(origin, Collection):
        inner = {int: " of whole numbers", str: " of texts"}.get(arguments[0], "")
        return f"a list{inner}"
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return "a text" if is_enum else f"a {getattr(kind, '__name__', kind)}"
