"""Widgets live until they are closed: closing all of them, and handlers that keep nothing alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

_lock = threading.Lock()
_shared: dict[tuple[Any, ...], Any] = {}
_uses: dict[Any, int] = {}
"""Shared layout or style -> widgets that have it."""


def shared(kind: Callable[..., Any], **values: str) -> Any:
    """A layout or style for one more widget that never changes it: equal ones are one object, and one message.

    Every widget of ipywidgets brings two more, which the front end has to make too.

    Args:
        kind: Its class.
        **values: Its traits.
    """
    key = (kind, *sorted(values.items()))
    with _lock:
        part = _shared.get(key)
        if part is None or part.comm is None:  # the latter after ``Widget.close_all()``
            part = _shared[key] = kind(**values)
        _uses[part] = _uses.get(part, 0) + 1
    return part


def close_tree(widget: Any) -> None:
    """Closes a widget, its children, and the layouts and styles that no other widget has. May be called twice."""
    if getattr(widget, "comm", None) is None:
        return  # closed before
    for child in getattr(widget, "children", ()):
        close_tree(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if part is not None and hasattr(part, "close") and not _used_elsewhere(part):
            part.close()


def _used_elsewhere(part: Any) -> bool:
    """Whether other widgets have it too; counts one less from now on."""
    with _lock:
        left = _uses.pop(part, 1) - 1
        if left > 0:
            _uses[part] = left
        else:
            for key in [key for key, value in _shared.items() if value is part]:
                del _shared[key]
        return left > 0


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
