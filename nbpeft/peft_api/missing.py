"""Names of PEFT that nbpeft has nothing for: they can be imported, and refuse in one line when they are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

from nbpeft.errors import NotSupportedError


@cache
def missing(name: str, method: str, place: str) -> Any:
    """What stands for a name: the same object each time.

    Args:
        name: the name. In capitals it is a table, and empty; with a first capital a class, else a function.
        method: the method it is of, for people; empty if it is of none.
        place: PEFT's module below ``peft``, for names that several modules have.

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
    """A class for ``isinstance``, ``except`` and annotations; making an instance refuses, and so do its attributes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError(str(cls.__doc__), name=cls.__name__)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python itself asks for
            raise AttributeError(name)
        raise AttributeError(str(cls.__doc__))


def _missing_function(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError(reason, name=name)

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = reason
    return refuse
