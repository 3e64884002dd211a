"""Lets rooms above the engine add the attributes that other libraries expect on wrappers.

The engine's wrappers have the attributes that the engine needs. A library such as PEFT has more: ``layer.scaling``,
``layer.merge()``. They are added to the classes themselves, and not to subclasses, because pickled models refer to the
classes of the engine.
"""

from __future__ import annotations

from torch import nn

_OF_EVERY_CLASS = {*vars(type("_", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"}


def add_attributes(wrapper: type[nn.Module], provider: type[nn.Module]) -> None:
    """Adds what a class defines to a class of wrappers; subclasses and existing objects have it, too.

    Args:
        wrapper: a class of this room.
        provider: a class derived from it, of which no object is made. Its functions cannot use ``super()``.
    """
    for name, value in vars(provider).items():
        if name not in _OF_EVERY_CLASS:
            setattr(wrapper, name, value)
