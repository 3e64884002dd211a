"""Values as plain JSON types, for programs that read errors, results and states.

as_json(value)    numbers, text, lists and dicts; anything else as a short text
AsDict            base class of results: ``to_dict()``
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from nbpeft.confidential import is_secret, masked

_LONGEST_OBJECT, _DEEPEST, _MOST_BITS = 200, 20, 1024
_MASK = "***"


def as_json(value: object, depth: int = 0) -> Any:
    """Returns a value as types that ``json.dumps`` accepts, without an access token and without NaN, which JSON lacks.

    Sets become sorted lists, NaN and infinities become None. Scalars of numpy and torch become numbers. An object that
    is not data becomes its ``str`` if that is one short line, and else its type in angle brackets.

    Args:
        value: the value.
        depth: number of containers around it; the content of those that are too deep is left out.
    """
    if isinstance(value, enum.Enum):
        return as_json(value.value, depth)
    if value is None or (isinstance(value, int) and value.bit_length() <= _MOST_BITS):
        return value
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth == _DEEPEST:
        return _described(value)
    if isinstance(value, Mapping):
        named = ((str(as_json(key)), item) for key, item in value.items())
        return {key: _MASK if is_secret(key, item) else as_json(item, depth + 1) for key, item in named}
    if isinstance(value, list | tuple):
        return [as_json(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(item, depth + 1) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value, depth)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return as_json(value.item(), depth + 1)
    return _described(value)


class AsDict:
    """A result that programs can read: ``str`` is its plain text, and ``to_dict`` has its values."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON types: its ``type``, its ``text`` as printed in a terminal, and its fields.

        Fields that are no part of its value, e.g. its reference to the model, are left out.
        """
        kind = next(cls.__name__ for cls in type(self).__mro__ if not cls.__name__.startswith("_"))
        fields: dict[str, Any] = _fields(self, 0) if dataclasses.is_dataclass(self) else {}
        return {"type": kind, "text": masked(str(self)), **fields}


def _fields(value: Any, depth: int) -> dict[str, Any]:
    """The fields of a dataclass that take part in comparisons."""
    compared = (field.name for field in dataclasses.fields(value) if field.compare)
    return {name: as_json(getattr(value, name), depth + 1) for name in compared}


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
