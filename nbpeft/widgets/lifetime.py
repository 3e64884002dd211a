"""Widgets live until they are closed: closing all of them, and handlers that keep nothing alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def close_tree(widget: Any) -> None:
    """Closes a widget, its children, and the layouts and styles that belong to them."""
    for child in getattr(widget, "children", ()):
        close_tree(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if part is not None and hasattr(part, "close"):
            part.close()


def weakly(method: Callable[..., None], *arguments: object) -> Callable[[Any], None]:
    """A handler that calls a bound method and holds its object weakly.

    Args:
        method: A bound method.
        *arguments: What to call it with; the event itself is dropped.
    """
    reference = weakref.WeakMethod(method)

    def handle(_event: Any) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return handle


def view_of(widget: Any) -> dict[str, Any]:
    """The view of a widget as a MIME bundle's entry, in the form that ipywidgets 7 and 8 share."""
    return {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
