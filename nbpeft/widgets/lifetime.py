"""The lifetime of widgets: they live until they are closed, and a handler must not keep a panel alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

_lock = threading.Lock()
_shared: dict[tuple[Any, ...], Any] = {}
_uses: dict[Any, int] = {}
"""Shared layout or style -> number of widgets that use it."""


def shared(kind: Callable[..., Any], **values: str) -> Any:
    """A layout or style shared by all widgets with equal ones; a widget that uses it must never change it.

    Otherwise each widget of ipywidgets creates a layout and a style of its own: two more comm messages and two more
    models in the front end.

    Returns:
        The shared object; ``close_tree`` of its last widget closes it.
    """
    key = (kind, *sorted(values.items()))
    with _lock:
        part = _shared.get(key)
        if part is None or part.comm is None:  # the latter after ``Widget.close_all()``
            part = _shared[key] = kind(**values)
        _uses[part] = _uses.get(part, 0) + 1
    return part


def close_tree(widget: Any) -> None:
    """Closes a widget, its children, and the layouts and styles that no other widget uses. May be called twice."""
    if getattr(widget, "comm", None) is None:
        return  # closed before
    for child in getattr(widget, "children", ()):
        close_tree(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if part is not None and hasattr(part, "close") and not _used_elsewhere(part):
            part.close()


def send_tree(widget: Any) -> None:
    """Sends the whole state of a widget and of its children again."""
    if getattr(widget, "comm", None) is None:
        return
    for child in getattr(widget, "children", ()):
        send_tree(child)
    widget.send_state()


def _used_elsewhere(part: Any) -> bool:
    """Removes one user of a layout or style; returns whether other widgets still use it."""
    with _lock:
        left = _uses.pop(part, 1) - 1
        if left > 0:
            _uses[part] = left
        else:
            for key in [key for key, value in _shared.items() if value is part]:
                del _shared[key]
        return left > 0


def weakly(method: Callable[..., None], *arguments: object) -> Callable[[Any], None]:
    """A handler that calls a bound method through a weak reference to its object.

    ipywidgets keeps widgets, and thus their handlers, alive until they are closed: a plain bound method would keep the
    panel, its session and the model alive too.

    Args:
        method: A bound method.
        *arguments: The arguments of the call; the event itself is not passed on.

    Returns:
        The handler; it does nothing once the object is gone.
    """
    reference = weakref.WeakMethod(method)

    def handle(_event: Any) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return handle


def view_of(widget: Any) -> dict[str, Any]:
    """The entry of a MIME bundle that shows a widget, in the form that ipywidgets 7 and 8 share."""
    return {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
