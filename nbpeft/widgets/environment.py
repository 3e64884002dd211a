"""What can be shown where this code runs, and in which thread it has to be sent."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import threading
import weakref
from typing import Any, Literal, Protocol

from nbpeft._util.interrupts import in_main_thread
from nbpeft.widgets.click_delivery import running_kernel

Ui = Literal["auto", "widgets", "html", "text"]
Shown = Literal["widgets", "html", "text"]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def shown_as(ui: Ui = "auto") -> Shown:
    """How to show something: with widgets, as HTML, or as lines of text.

    Args:
        ui: The requested form; ``auto`` takes the richest that works here.
    """
    marimo = in_marimo()
    if ui == "text" or (ui == "auto" and running_kernel() is None and not marimo):
        return "text"
    return "widgets" if ui != "html" and has_ipywidgets() and not marimo else "html"


def in_marimo() -> bool:
    """Whether this code runs in a marimo notebook, which shows HTML but no ipywidgets."""
    asked = getattr(sys.modules.get("marimo"), "running_in_notebook", None)  # a module of the user may have that name
    return callable(asked) and bool(asked())


def has_ipywidgets() -> bool:
    """Whether ipywidgets can be imported; does not import it."""
    return "ipywidgets" in sys.modules or importlib.util.find_spec("ipywidgets") is not None


def widgets_hint() -> str:
    """How to get buttons where ipywidgets is missing and can be shown, or the empty string."""
    if has_ipywidgets() or in_marimo():
        return ""
    return f"For Stop and Pause buttons: {shlex.quote(sys.executable)} -m pip install ipywidgets"


def drops_threads() -> bool:
    """Whether the front end drops what another thread than the main one sends, as Colab does (colabtools#3373)."""
    return "google.colab" in sys.modules


class View(Protocol):
    """Something shown that other threads than the main one draw."""

    def resend(self) -> None:
        """Sends all of its last state again."""


class Resender:
    """Sends in the main thread what other threads have drawn, where their messages are dropped.

    It does so within a second while no cell runs, and at the end of each cell.
    """

    _SECONDS = 1.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._views: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scheduled = False
        self._events: Any = None

    def drawn(self, view: View) -> None:
        """Notes that a view was drawn in this thread."""
        kernel = running_kernel()
        if in_main_thread() or kernel is None or not drops_threads():
            return
        with self._lock:
            self._views.add(view)
            scheduled, self._scheduled = self._scheduled, True
            if self._events is None:
                self._events = kernel.shell.events
                self._events.register("post_run_cell", self._cell_ended)
        if not scheduled:
            kernel.io_loop.add_callback(kernel.io_loop.call_later, self._SECONDS, self._send)

    def close(self) -> None:
        """Forgets the views, and the shell."""
        with self._lock:
            events, self._events = self._events, None
            self._views.clear()
        if events is not None:
            events.unregister("post_run_cell", self._cell_ended)

    def _send(self) -> None:
        with self._lock:
            self._scheduled, views = False, list(self._views)
        for view in views:
            view.resend()

    def _cell_ended(self, *_: object) -> None:
        """Sends once more: a message that belongs to no running cell may be dropped, too."""
        with self._lock:
            views = list(self._views)
            self._views.clear()  # before they are sent: what is drawn meanwhile is sent later
        for view in views:
            view.resend()


resender = Resender()
