"""Values as plain JSON types, for programs that read errors, results and states.

as_json(value)    numbers, text, lists and dicts; anything else as a short text
AsDict            base class of results: ``to_dict()``
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Mapping
from typing import Any

from nbpeft.confidential import has_secret_name, masked

_LONGEST_OBJECT, _DEEPEST, _MOST_BITS = 200, 20, 1024
_MASK = "***"


def as_json(value: object, around: tuple[int, ...] = ()) -> Any:
    """Returns a value as types that ``json.dumps`` accepts, without an access token and without NaN, which JSON lacks.

    Sets become sorted lists, NaN and infinities become None. Scalars of numpy and torch become numbers. An object that
    is not data, or that cannot be read, becomes its ``str`` if that is one short line, and else its type in angle
    brackets.

    Args:
        value: the value.
        around: ids of the containers around it; a container in itself, or in too many others, is not read.
    """
    try:
        return _as_json(value, around)
    except Exception:  # e.g. a tensor on the meta device has no number
        return _described(value)


def _as_json(value: object, around: tuple[int, ...]) -> Any:
    if isinstance(value, enum.Enum):
        return as_json(value.value, around)
    if value is None or (isinstance(value, int) and value.bit_length() <= _MOST_BITS):
        return value
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, os.PathLike):
        return as_json(os.fspath(value), around)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if len(around) == _DEEPEST or id(value) in around:
        return _described(value)
    within = (*around, id(value))
    if isinstance(value, Mapping):
        return _named(value, within)
    if isinstance(value, list | tuple):
        return [as_json(item, within) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(item, within) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _named(_fields(value), within)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return as_json(value.item(), within)
    return _described(value)


class AsDict:
    """A result that programs can read: ``str`` is its plain text, and ``to_dict`` has its values."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON types: its ``type``, its ``text`` as printed in a terminal, and its fields.

        Fields that are no part of its value, e.g. its reference to the model, are left out.
        """
        kind = next(cls.__name__ for cls in type(self).__mro__ if not cls.__name__.startswith("_"))
        fields: dict[str, Any] = as_json(_fields(self)) if dataclasses.is_dataclass(self) else {}
        return {"type": kind, **fields, "text": masked(str(self))}


def _named(values: Mapping[Any, Any], around: tuple[int, ...]) -> dict[str, Any]:
    named = ((str(as_json(key)), item) for key, item in values.items())
    return {key: _MASK if has_secret_name(key, item) else as_json(item, around) for key, item in named}


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that take part in comparisons."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}


def _described(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    try:
        text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    except Exception:
        text = ""
    if not text or len(text) > _LONGEST_OBJECT or "\n" in text or " at 0x" in text:
        return f"<{type(value).__name__}>"
    return masked(text)
