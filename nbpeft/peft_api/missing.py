"""Names of PEFT that nbpeft does not implement: they can be imported, and raise a clear error when they are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

from nbpeft.errors import NotSupportedError


@cache
def missing(name: str, method: str, place: str) -> Any:
    """Returns the replacement for a name; the same object each time.

    Args:
        name: the name. In upper case it is a table; with an upper-case first letter a class; otherwise a function.
        method: display name of the method that it belongs to, or the empty string.
        place: PEFT's module below ``peft``, which distinguishes equal names of several modules.

    Returns:
        A class that has no instances, a function that raises NotSupportedError, or an empty dictionary.
    """
    reason = f"{name} is not available: nbpeft does not implement {method or 'it'}"
    if name.isupper():
        return {}
    if name.lstrip("_")[:1].isupper():
        return _MissingClass(name, (), {"__module__": f"peft.{place}".rstrip("."), "__doc__": reason})
    return _missing_function(name, reason)


class _MissingClass(type):
    """A class for ``isinstance``, ``except`` and annotations; creating an instance or reading an attribute fails."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError(str(cls.__doc__), name=cls.__name__)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):  # attributes that Python itself looks up
            raise AttributeError(name)
        raise AttributeError(str(cls.__doc__))


def _missing_function(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError(reason, name=name)

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = reason
    return refuse
