"""Checks of adapter names and scales, and dictionaries by adapter name."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from nbpeft.engine.contract.adapter import is_of_an_adapter
from nbpeft.errors import AdapterError, UnknownAdapterError, did_you_mean, shown

BASE_NAME = "__base__"
"""Name of the base model in a mixed batch."""
_TAKEN_NAMES = {
    BASE_NAME: "it means the base model in a mixed batch",
    "base": "it means the base model in panels and results",
    "training": "every torch module has an attribute of that name",
}


class ByName(dict[str, Any]):
    """A dictionary by adapter name in which a missing name raises ``UnknownAdapterError``.

    Another thread may delete an adapter at any time, so that even a name that was just checked can be missing.

    When an adapter is deleted from its last layer, its entry is removed too. Other libraries delete an adapter from the
    layers first and from this dictionary afterwards, so ``pop`` returns the entry once more, and ``del`` accepts it.
    """

    def leave(self, name: str) -> None:
        """Removes an entry, which can be popped or deleted once more."""
        self._left[name] = super().pop(name)

    def pop(self, name: str, *default: Any) -> Any:
        """Removes an entry and returns it; also returns an entry that ``leave`` removed, once.

        Args:
            name: name of the adapter.
            *default: value for a missing name, which is an error without it.

        Raises:
            AdapterError: the entry belongs to an adapter that is still on the model.
        """
        self._refuse_present(name)
        return super().pop(name, *default) if name in self else self._left.pop(name, *default)

    def __delitem__(self, name: str) -> None:
        self._refuse_present(name)
        if name in self or name not in self._left:
            super().__delitem__(name)
        else:
            del self._left[name]

    def _refuse_present(self, name: str) -> None:
        if name in self and is_of_an_adapter(self[name]):
            raise AdapterError(
                f"the config of adapter {name!r} cannot be taken away from it: delete_adapter({name!r}) removes the "
                f"adapter, and model.manager.rename({name!r}, new) renames it",
                name=name,
            )

    @property
    def _left(self) -> dict[str, Any]:
        return self.__dict__.setdefault("left", {})

    def __missing__(self, name: object) -> Any:
        raise unknown_adapter(name, self)

    def place(self, name: str, value: Any, place: int) -> None:
        """Sets an entry and its position in the order.

        Args:
            name: name of the adapter.
            value: its new value.
            place: position among the other entries, from 0.
        """
        items = [item for item in self.items() if item[0] != name]
        items.insert(place, (name, value))
        self.clear()
        self.update(items)


def unknown_adapter(name: object, present: Collection[str], where: str = "the model has") -> UnknownAdapterError:
    """Creates the error for an unknown adapter name.

    Args:
        name: the unknown name.
        present: names of the adapters on the model.
        where: what has them, with the verb.

    Returns:
        The error, for the caller to raise.
    """
    have = ", ".join(map(repr, present)) or "none"
    several = {part.strip() for part in str(name).split(",")}
    hint = " Write several names separately, without commas." if len(several) > 1 and several <= {*present} else ""
    return UnknownAdapterError(
        f"Adapter {name!r} not found; {where}: {have}." + (hint or did_you_mean(str(name), present)),
        name=name,
        available=tuple(present),
    )


def check_name(name: object) -> None:
    """Raises AdapterError for a name that cannot be a key, a folder or part of a parameter name."""
    if not isinstance(name, str) or not name.strip() or any(c in name for c in "./\\\0\n"):
        raise AdapterError(
            f"{shown(name)} cannot name an adapter: use a non-empty text without dots and slashes", name=name
        )
    if name in _TAKEN_NAMES:
        raise AdapterError(f"{name!r} cannot name an adapter: {_TAKEN_NAMES[name]}; take another name", name=name)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise AdapterError(f"{shown(name)} cannot name an adapter: it contains a surrogate character", name=name)


def names_in(names: object) -> tuple[str, ...]:
    """Converts one name or several to a tuple without repeats.

    Raises:
        AdapterError: ``names`` is neither a string nor iterable.
    """
    if isinstance(names, str):
        return (names,)
    try:
        return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
    except TypeError:
        raise AdapterError(f"expected the name of an adapter or a list of names, not {names!r:.60}") from None


def check_scale(name: str, scale: Any, *, fixed: bool = False) -> float:
    """Checks the factor on an adapter's delta.

    Args:
        name: name of the adapter.
        scale: the factor.
        fixed: whether the adapter has no delta (a prompt), so that the factor can only be 1.

    Returns:
        The factor as a float.

    Raises:
        AdapterError: it is not a finite number, or not 1 although ``fixed``.
    """
    try:
        factor = float(scale)
    except (TypeError, ValueError, OverflowError):
        factor = math.nan
    if not math.isfinite(factor):
        raise AdapterError(f"the scale of adapter {name!r} must be a finite number, not {shown(scale)}", name=name)
    if fixed and factor != 1.0:
        raise AdapterError(
            f"adapter {name!r} cannot have a scale of {factor:.3g}, only 1: it is a prompt, which cannot be scaled",
            name=name,
        )
    return factor
