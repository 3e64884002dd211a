"""Refuses names that a function, an argument or a method had before, and says what it is called now."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from nbpeft.errors import ConfigTypeError
from nbpeft.names import RENAMED, RENAMED_FUNCTIONS

_Function = TypeVar("_Function", bound=Callable[..., Any])


def refusing_former_names(function: _Function) -> _Function:
    """Make a function refuse a former name of one of its arguments, with the present one in the message."""

    @functools.wraps(function)
    def called(*args: Any, **keywords: Any) -> Any:
        refuse_former_names(function, keywords)
        return function(*args, **keywords)

    return cast(_Function, called)


def refuse_former_names(
    function: Callable[..., Any], keywords: Mapping[str, object], called: str | None = None
) -> None:
    """Refuse former names of a function's arguments.

    Args:
        function: the function.
        keywords: the keyword arguments that it was given.
        called: its name for the message, by default its own.

    Raises:
        ConfigTypeError: one of the keywords is such a name, and the function has the present one.
    """
    for old in keywords.keys() & RENAMED.keys():
        known = inspect.signature(function).parameters
        new = next((name for name in RENAMED[old] if name in known), None)
        if new is not None and old not in known:
            raise ConfigTypeError(
                f"{called or function.__name__}() has no argument {old!r}; it is called {new!r} now", name=old
            )


def former_function(name: str) -> str:
    """Return the end of the message about a missing attribute, if it is a function's or a method's former name."""
    return f"; it is called {RENAMED_FUNCTIONS[name]!r} now" if name in RENAMED_FUNCTIONS else ""
