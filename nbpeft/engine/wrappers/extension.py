"""Lets rooms above the engine add the attributes that other libraries expect on wrappers, configs and models.

The engine's classes only have the attributes that the engine needs; PEFT's layers have more, such as
``layer.scaling`` and ``layer.merge()``. They are added to the engine's classes instead of subclasses, because pickled
models refer to these classes.
"""

from __future__ import annotations

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
