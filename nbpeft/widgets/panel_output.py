"""The outputs of a panel in a notebook: two outputs of one cell, of which one is visible.

    state     HTML with the panel's last state: saved with the notebook, hidden while the widgets are connected
    widgets   the controls: hidden if their kernel is gone

A notebook that is opened again with a new kernel still contains the view of the widgets, and JupyterLab writes
"Error displaying widget: model not found" in its place. The view cannot be removed from the file when the kernel ends,
so the style sheet next to the state hides it: the view of a widget that is gone has no child element, and that of one
whose kernel restarted has the class ``jupyter-widgets-disconnected``. Untrusted notebooks, nbconvert and GitHub can
show only the state.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from nbpeft.widgets.aria import SCRIPT
from nbpeft.widgets.environment import WIDGET_VIEW
from nbpeft.widgets.lifetime import view_of

INTERVAL = 0.2
"""The shortest time between two updates of the state, in seconds."""
_REST = 50
"""Drawing the state takes at most one part in this many of the time."""
_LONGEST = 1.0
"""The longest time between two updates, in seconds."""
_EMPTY = {"text/html": "", "text/plain": ""}
DEAD_WIDGETS = """\
.jp-OutputArea-child:has(.nbpeft-state) + .jp-OutputArea-child:not(:has(.jupyter-widgets *)),
.nbpeft-panel.jupyter-widgets-disconnected, .nbpeft-run.jupyter-widgets-disconnected { display: none !important; }
body.jp-Notebook .jp-OutputArea-child:has(.nbpeft-state) > .jp-OutputPrompt:empty { padding: 6px; flex-shrink: 0; }
"""
"""Hides the view of widgets that are gone, if the output before it is a state.

In a page that nbconvert has exported, the last rule aligns the state with results, whose prompts have a number.
"""


class PanelOutput:
    """The outputs of one panel in the running cell.

    Args:
        state: Returns the state as a MIME bundle.
        lock: Locked while the state is drawn.
        interval: The shortest time between two updates of the state, in seconds.
    """

    def __init__(
        self, state: Callable[[], dict[str, str]], lock: threading.RLock, *, interval: float | None = None
    ) -> None:
        self._state, self._lock = state, lock
        self._interval = INTERVAL if interval is None else interval
        self._name = f"nbpeft-{uuid.uuid4().hex[:12]}"
        self._outputs: tuple[Any, ...] = ()
        self._cleared: tuple[Any, ...] = ()
        self._sent: dict[str, str] = {}
        self._timer: threading.Timer | None = None

    @property
    def css(self) -> str:
        """Style rules that hide the state while the widgets are connected."""
        live = f":root:has(.{self._name}-view:not(.jupyter-widgets-disconnected))"
        return f"{live} .{self._name}, {live} .jp-OutputArea-child:has(.{self._name}) {{ display: none; }}"

    def show(self, root: Any) -> None:
        """Displays the state and the widgets."""
        from IPython.display import display

        root.add_class(f"{self._name}-view")
        self._sent = self._state()
        view = {WIDGET_VIEW: view_of(root), **_EMPTY}
        self._outputs = tuple(display(bundle, raw=True, display_id=True) for bundle in (self._framed(), view))

    def changed(self) -> None:
        """Sends the state again, now or after the shortest time between two updates.

        The last state is sent twice: a front end or server that limits the message rate may have dropped it.
        """
        with self._lock:
            if self._outputs and self._timer is None:
                self._send()

    def close(self, leaving: dict[str, str] | None = None) -> None:
        """Clears the widgets' output. May be called twice.

        Args:
            leaving: The MIME bundle that replaces the state from now on; the last state by default.
        """
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            outputs, self._outputs = self._outputs, ()
            if outputs:
                state, *widgets = outputs
                state.update(leaving or self._state(), raw=True)
                for output in widgets:
                    output.update(_EMPTY, raw=True)

    def only_state(self) -> None:
        """Clears the widgets' output in the open page, sends the state, and continues to update it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            state, *widgets = self._outputs or (None,)
            self._outputs, self._cleared = () if state is None else (state,), tuple(widgets)
            self._clear()
            self._send(again=False)

    def resend(self) -> None:
        """Sends the state once more, and that the widgets' output is cleared if it is."""
        with self._lock:
            self._clear()
            if self._timer is not None:
                self._timer.cancel()
            self._send(again=False)

    def flush(self) -> None:
        """Sends a change now that waits for the shortest time between two updates."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._send(again=False)

    def _clear(self) -> None:
        for output in self._cleared:
            output.update(_EMPTY, raw=True)

    def _send(self, *, again: bool = True) -> None:
        with self._lock:
            self._timer = None
            if not self._outputs:
                return
            begun = time.thread_time()  # not wall time: a busy machine must not delay the last state
            state = self._state()
            changed, self._sent = state != self._sent, state
            self._outputs[0].update(self._framed(), raw=True)
            if changed and again:
                wait = max(self._interval, min(_REST * (time.thread_time() - begun), _LONGEST))
                self._timer = threading.Timer(wait, self._send)
                self._timer.daemon = True
                self._timer.start()

    def _framed(self) -> dict[str, str]:
        """The state, with the class name by which the widgets' style rules hide it."""
        state = f'<div class="nbpeft-state {self._name}">{self._sent["text/html"]}</div>'
        return {**self._sent, "text/html": f"<style>{DEAD_WIDGETS}</style>{SCRIPT}{state}"}
