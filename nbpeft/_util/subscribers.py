"""Callbacks for events."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from nbpeft.errors import in_one_line

Callback = Callable[..., Any]


class Subscribers:
    """Callbacks for events; bound methods are referenced weakly, so that subscribing does not keep objects alive."""

    def __init__(self) -> None:
        self._references: list[Callable[[], Callback | None]] = []

    def add(self, callback: Callback) -> Callable[[], None]:
        """Add a callback; return a function that removes it again."""
        reference: Callable[[], Callback | None]
        reference = weakref.WeakMethod(callback) if inspect.ismethod(callback) else (lambda: callback)
        self._references.append(reference)

        def remove() -> None:
            if reference in self._references:
                self._references.remove(reference)

        return remove

    def notify(self, *event: object) -> list[str]:
        """Call every callback; return one line for each that failed."""
        failures = []
        for reference in list(self._references):
            callback = reference()
            if callback is None:
                if reference in self._references:
                    self._references.remove(reference)
                continue
            try:
                callback(*event)
            except Exception as error:
                name = getattr(callback, "__qualname__", repr(callback))
                failures.append(f"a subscriber failed: {name}: {type(error).__name__}: {in_one_line(error)}")
        return failures

    def clear(self) -> None:
        """Remove all callbacks."""
        self._references.clear()
