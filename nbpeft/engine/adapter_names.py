"""Names and scales of adapters, as people give them."""

from __future__ import annotations

import math
from typing import Any

from nbpeft.errors import AdapterError, shown

BASE_NAME = "__base__"
"""Name of the base model in a mixed batch."""
_TAKEN_NAMES = {
    BASE_NAME: "it stands for the base model in a mixed batch",
    "base": "it stands for the base model in panels and results",
    "training": "torch keeps there whether a module trains",
}


def check_name(name: object) -> None:
    """Raises AdapterError for a name that cannot be a key, a folder or part of a parameter name."""
    if not isinstance(name, str) or not name.strip() or any(c in name for c in "./\\\0\n"):
        raise AdapterError(
            f"{shown(name)} cannot name an adapter: use a non-empty text without dots and slashes", name=name
        )
    if name in _TAKEN_NAMES:
        raise AdapterError(f"{name!r} cannot name an adapter: {_TAKEN_NAMES[name]}; take another name", name=name)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise AdapterError(f"{shown(name)} cannot name an adapter: it holds half a character (a surrogate)", name=name)


def names_in(names: object) -> tuple[str, ...]:
    """One name or several as a tuple, each once.

    Raises:
        AdapterError: they are neither.
    """
    if isinstance(names, str):
        return (names,)
    try:
        return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
    except TypeError:
        raise AdapterError(f"expected the name of an adapter or a list of names, not {names!r:.60}") from None


def check_scale(name: str, scale: Any, *, fixed: bool = False) -> float:
    """The factor on an adapter's delta as a float.

    Args:
        name: of the adapter.
        scale: the factor.
        fixed: whether the adapter has no delta, so that the factor can only be 1.

    Raises:
        AdapterError: it is no finite number, or cannot be that one.
    """
    try:
        factor = float(scale)
    except (TypeError, ValueError, OverflowError):
        factor = math.nan
    if not math.isfinite(factor):
        raise AdapterError(f"the scale of adapter {name!r} must be a finite number, not {shown(scale)}", name=name)
    if fixed and factor != 1.0:
        raise AdapterError(
            f"adapter {name!r} cannot have a scale of {factor:.3g}: tokens of a prompt are there or not, so 1",
            name=name,
        )
    return factor
