"""Lets rooms above the engine add the attributes that other libraries expect on wrappers, configs and models.

The engine's classes have the attributes that the engine needs. A library such as PEFT has more: ``layer.scaling``,
``layer.merge()``. They are added to the classes themselves, and not to subclasses, because pickled models refer to the
classes of the engine.
"""

from __future__ import annotations

_OF_EVERY_CLASS = {*vars(type("_", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"}


on_models: dict[str, str] = {}
"""Attribute of adapted base models -> the attribute of their manager with its value."""


def add_attributes(cls: type, provider: type) -> None:
    """Adds what a class defines to a class of the engine; subclasses and existing objects have it, too.

    Args:
        cls: a class of wrappers or configs.
        provider: a class derived from it, of which no object is made. Its functions cannot use ``super()``.
    """
    for name, value in vars(provider).items():
        if name not in _OF_EVERY_CLASS:
            setattr(cls, name, value)
