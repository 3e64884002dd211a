"""Lets rooms above the engine add the attributes that other libraries expect on wrappers, configs and models.

The engine's classes only have the attributes that the engine needs; PEFT's layers have more, such as
``layer.scaling`` and ``layer.merge()``. They are added to the engine's classes instead of subclasses, because pickled
models refer to these classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.base import Backend, LayerKind

_Wrapper = TypeVar("_Wrapper")
Titled = Callable[[type[Any], type[Adapter], LayerKind | None, Backend | None], type[Any]]
"""(class of the engine, class of the first adapter, kind, backend) -> the class of a new wrapper."""
_titled: list[Titled] = []
_OF_EVERY_CLASS = {*vars(type("_", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"}


on_models: dict[str, str] = {}
"""Attribute of adapted base models -> the attribute of their manager with its value."""


def add_attributes(cls: type, provider: type) -> None:
    """Adds the attributes of one class to a class of the engine, with effect on subclasses and existing objects.

    Args:
        cls: a class of wrappers or configs.
        provider: a class derived from it that is never instantiated. Its functions cannot use ``super()``.
    """
    for name, value in vars(provider).items():
        if name not in _OF_EVERY_CLASS:
            setattr(cls, name, value)


def title_wrappers(titled: Titled) -> None:
    """Lets new wrappers be of subclasses, whose names other libraries look at.

    Args:
        titled: returns the subclass; without attributes of its own, so that it computes as the engine's class.
    """
    _titled[:] = [titled]


def class_of_wrapper(
    cls: type[_Wrapper], adapter: type[Adapter], kind: LayerKind | None = None, backend: Backend | None = None
) -> type[_Wrapper]:
    """Returns the class of a new wrapper.

    Args:
        cls: the class of the engine that it derives from.
        adapter: the class of its first adapter.
        kind: kind of the layer; None for a block.
        backend: backend of the layer; None for a block.
    """
    return _titled[0](cls, adapter, kind, backend) if _titled else cls
