"""Attributes of an adapted layer by adapter name, as the record of each adapter's method declares them.

layer.r["default"]        layer.lora_alpha        layer.update_layer("default", …)

Parameters, as in ``layer.core["default"].weight``, are in ``part_modules``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from operator import attrgetter
from typing import Any, Self

from torch import Tensor, nn

from nbpeft.errors import PeftWarning


class PerAdapterView(MutableMapping[str, Any], dict[str, Any]):  # type: ignore[metaclass,misc]
    """One attribute of the adapters of a layer, by adapter name; also ``view.default`` for ``view["default"]``.

    It is a ``dict`` for ``isinstance``, but stores nothing: values are read from the adapters on each access, until
    another dictionary replaces the view.

    Args:
        adapters: the layer's adapters by name, looked up on each access.
        attribute: name of the attribute; the view contains the adapters that have it.
        read: returns the attribute of an adapter.
        write: sets the attribute; None if it is read-only.
    """

    def __init__(
        self,
        adapters: dict[str, Any],
        attribute: str,
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self.__dict__.update(_adapters=adapters, _attribute=attribute, _read=read, _write=write, _kept=None)
        # The json module writes "{}" for a dictionary whose own storage is empty, without calling ``items``.
        dict.__setitem__(self, "", None)  # type: ignore[index]

    def keep(self) -> None:
        """Stores the current values, and no longer reads or writes the adapters."""
        self.__dict__["_kept"] = {key: one.clone() if isinstance(one, Tensor) else one for key, one in self.items()}

    def resume(self) -> None:
        """Reads and writes the adapters again."""
        self.__dict__["_kept"] = None

    def is_of(self, adapters: dict[str, Any]) -> bool:
        """Whether the view reads these adapters."""
        return self.__dict__["_adapters"] is adapters

    def _adapter(self, name: str) -> Any:
        adapter = self.__dict__["_adapters"][name]
        if not _has(adapter, self.__dict__["_attribute"]):
            raise KeyError(name)
        return adapter

    def __getitem__(self, name: str) -> Any:
        kept = self.__dict__["_kept"]
        return self.__dict__["_read"](self._adapter(name)) if kept is None else kept[name]

    def __setitem__(self, name: str, value: Any) -> None:
        write, kept = self.__dict__["_write"], self.__dict__["_kept"]
        if kept is not None:
            kept[name] = value
        elif write is None:
            raise TypeError("this attribute of an adapter cannot be set; change its weight in place")
        else:
            write(self._adapter(name), value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("use delete_adapter() to remove an adapter")

    def __iter__(self) -> Iterator[str]:
        attribute, kept = self.__dict__["_attribute"], self.__dict__["_kept"]
        if kept is not None:
            return iter([*kept])
        return iter([name for name, adapter in self.__dict__["_adapters"].items() if _has(adapter, attribute)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no adapter {name!r} here; there are {', '.join(map(repr, self)) or 'none'}")

    def copy(self) -> dict[str, Any]:
        """The current values as a dictionary."""
        return dict(self)

    # Mapping does not define these methods of dict, which would read the dictionary's storage (for json only).

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | dict(self)

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return repr(dict(self))


def by_name(adapters: dict[str, Any], name: str) -> PerAdapterView | None:
    """A view of an attribute that PEFT's layers have; None if no adapter of the layer has it.

    Args:
        adapters: adapter name -> adapter.
        name: one of the ``attributes`` of ``PeftNames``.
    """
    for adapter in adapters.values():
        own = adapter.peft.attributes.get(name)
        if own is not None:
            return PerAdapterView(adapters, own, attrgetter(own), partial(_warn_of_unused, name, attrgetter(own)))
    return None


def _warn_of_unused(name: str, read: Callable[[Any], Any], adapter: Any, value: object) -> None:
    """Warns that a setting cannot be written; scripts set ``layer.r`` before factors of that rank."""
    if value != read(adapter):
        warnings.warn(
            f"setting {name} on a layer changes nothing: it is read from the adapter ({read(adapter)!r} now); set the "
            "tensors or scaling",
            PeftWarning,
            stacklevel=4,
        )


def function_by_name(layer: nn.Module, adapters: Mapping[str, Any], name: str) -> Callable[..., Any] | None:
    """A function that PEFT's layers have for an adapter's method; None if no adapter has one of this name.

    Args:
        layer: the layer.
        adapters: adapter name -> adapter of the layer.
        name: one of the ``functions`` of ``PeftNames``.
    """
    found = (adapter.peft.functions[name] for adapter in adapters.values() if name in adapter.peft.functions)
    return next((partial(function, layer) for function in found), None)


def attribute_by_name(adapters: dict[str, Any], name: str) -> PerAdapterView | None:
    """A view of any other attribute of a layer's adapters; None if no adapter has it.

    Args:
        adapters: adapter name -> adapter.
        name: name of the attribute.
    """
    if name == "training" or not any(name in a.__dict__ for a in adapters.values()):
        return None
    return PerAdapterView(
        adapters, name, lambda adapter: adapter.__dict__[name], lambda a, value: setattr(a, name, value)
    )


def _has(adapter: nn.Module, attribute: str) -> bool:
    own = attribute.partition(".")[0]
    held = (adapter._parameters, adapter._buffers, adapter.__dict__)
    return any(own in one for one in held) or hasattr(type(adapter), own)
