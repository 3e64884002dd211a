"""Lets rooms above the engine add the attributes that other libraries expect on wrappers.

The engine's wrappers only have the attributes that the engine needs; PEFT's layers have more, such as
``layer.scaling`` and ``layer.merge()``. They are added to the engine's classes instead of subclasses, because pickled
models refer to these classes.
"""

from __future__ import annotations

from torch import nn

_OF_EVERY_CLASS = {*vars(type("_", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"}


def add_attributes(wrapper: type[nn.Module], provider: type[nn.Module]) -> None:
    """Adds the attributes of one class to a class of wrappers, with effect on subclasses and existing objects.

    Args:
        wrapper: a class of this room.
        provider: a class derived from it that is never instantiated. Its functions cannot use ``super()``.
    """
    for name, value in vars(provider).items():
        if name not in _OF_EVERY_CLASS:
            setattr(wrapper, name, value)
