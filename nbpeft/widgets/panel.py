"""The base of all panels: it displays itself, is the only one of its kind for its model, and shows errors."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Tone, dim, line
from nbpeft.display.html import to_html
from nbpeft.errors import BusyError, NbpeftError
from nbpeft.state import ModelState, SessionState
from nbpeft.widgets.environment import Ui, in_marimo, resender, shown_as
from nbpeft.widgets.lifetime import close_tree, send_tree
from nbpeft.widgets.panel_output import PanelOutput
from nbpeft.widgets.styles import style_sheet
from nbpeft.widgets.worker import Worker

if TYPE_CHECKING:
    from nbpeft.session import Session

AGAIN = "Run the cell again for buttons."
MOVED = "This panel was opened again in another cell; run this cell again to show it here."
_LINES = 16


class Panel:
    """A panel, shown as the last value of a cell or with ``display``.

    The widgets are created when the panel is first shown. There is one panel of a kind for a model:
    showing a new one closes the previous one. Without a kernel or without ipywidgets it is a card, or a
    line of text; a saved notebook contains the same, in its last state.

    Args:
        ui: How to show it; by default the richest form that works here.

    Attributes:
        closed: Whether it has been closed since it was last shown.
        on_change: Called after each change of what is shown.
    """

    kind: ClassVar[str]
    session_method: ClassVar[str]
    """The method of the session that does in Python what this panel does by clicks."""

    def __init__(self, ui: Ui) -> None:
        self._ui: Ui = ui
        self._lock = threading.RLock()
        self._parts: Any = None
        self._output: PanelOutput | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.closed = False

    @property
    def widget(self) -> Any:
        """The root widget, to place among other widgets; created on first use.

        Raises:
            ModuleNotFoundError: ipywidgets is not installed.
        """
        with self._lock:
            if self._parts is None:
                self._open()
            return self._parts.root

    def close(self, leaving: str = "") -> None:
        """Closes the widgets. May be called twice.

        Args:
            leaving: A line that stays where the panel was shown.
        """
        with self._lock:
            output, self._output = self._output, None
            if output is not None:
                output.close(_line(leaving) if leaving else None)
            self.closed = True
            parts, self._parts = self._parts, None
            if _open.get(self._place) is self:
                del _open[self._place]
        if parts is not None:
            self._release(parts)
            if leaving and output is None:
                _leave(parts.root, leaving)
            else:
                close_tree(parts.root)

    def __repr__(self) -> str:
        return self._text()

    def _ipython_display_(self) -> None:
        if self.closed or shown_as(self._ui) != "widgets":
            raise NotImplementedError  # IPython then calls _repr_mimebundle_
        with self._lock:
            root = self.widget
            if self._output is not None:
                self._output.close(_line(MOVED))
            self._output = PanelOutput(self._state, self._lock)
            root.children[0].value = style_sheet(self._output.css)
            self._output.show(root)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        if shown_as(self._ui) == "text":
            return {"text/plain": self._text()}
        if in_marimo():
            call = f"nbpeft.get_session().{self.session_method}(…)"
            return self._state(f"marimo does not show the buttons of this panel: call {call}.")
        return self._state("" if shown_as(self._ui) == "html" else AGAIN)

    # For subclasses

    @property
    def _key(self) -> Hashable:
        """Identifies what the panel shows: there is one panel of this kind for each key."""
        raise NotImplementedError

    def _build(self) -> Any:
        """Creates the widgets: an object with ``root`` and ``message``."""
        raise NotImplementedError

    def _opened(self) -> None:
        """Shows the first state; called once the widgets exist."""
        raise NotImplementedError

    def _release(self, parts: Any) -> None:
        """Releases what the panel uses other than widgets."""

    def _text(self) -> str:
        """The panel as plain text."""
        raise NotImplementedError

    def _card(self, hint: str) -> Block:
        """The panel without widgets; ``hint`` is a line at its end."""
        raise NotImplementedError

    def card(self) -> Block:
        """The panel without widgets, as it is now."""
        return self._card("")

    def _changed(self) -> None:
        """Updates the output that is saved with the notebook."""
        if self._output is not None:
            self._output.changed()
        self.on_change()
        resender.drawn(self)

    def resend(self) -> None:
        """Sends the widgets and the output that is saved with the notebook again."""
        with self._lock:
            if self._parts is not None and self._output is not None:
                send_tree(self._parts.root)
                self._output.resend()

    def _state(self, hint: str = AGAIN) -> dict[str, str]:
        """What is shown, as a MIME bundle that needs no widget."""
        text = self._text()
        separator = "\n" if "\n" in text else " "
        plain = separator.join(part for part in (text, hint) if part)
        return {"text/html": to_html(self._card(hint)), "text/plain": plain}

    def _failed(self) -> None:
        """Restores what a failed command had begun to change on screen."""

    def _run(self, *command: Any) -> str:
        """Runs the command of a widget; returns the message to show."""
        raise NotImplementedError

    # Opening, and reporting the result of a command; handlers may run in another thread

    def _command(self, *command: Any) -> None:
        """The entry point of all widgets: runs a command and shows its message."""
        with self._lock:
            if self._parts is not None:
                self._guarded(lambda: self._run(*command))

    @property
    def _place(self) -> tuple[str, Hashable]:
        return (self.kind, self._key)

    def _open(self) -> None:
        before = _open.get(self._place)
        if before is not None and before is not self:
            before.close(MOVED)
        self.closed = False
        self._parts = self._build()
        _open[self._place] = self
        self._opened()

    def _guarded(self, act: Callable[[], str], notices: Sequence[str] = ()) -> None:
        """Calls a function and shows the notices and its message, or its error."""
        tone: Tone
        try:
            words = act()
            self._say(" ".join((*notices, words)).strip(), "warning" if notices else "dim")
            return
        except NbpeftError as error:
            words = str(error)
            tone = "warning" if isinstance(error, BusyError) else "error"
        except Exception as error:  # Jupyter writes the traceback of a widget's handler to a log at most
            words, tone = f"{type(error).__name__}: {error}", "error"
        with self._lock:
            if self._parts is not None:
                self._failed()
        self._say(" ".join((*notices, words)), tone)

    def _say(self, words: str, tone: Tone) -> None:
        """Shows a message, or hides it if the text is empty."""
        with self._lock:
            if self._parts is None:
                return
            if words:
                self._parts.message.show(words, tone)
            else:
                self._parts.message.clear()
        resender.drawn(self)


class WorkerPanel(Panel):
    """A panel that computes in a thread of its own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._worker = Worker()

    def close(self, leaving: str = "") -> None:
        """Stops computing and closes the widgets. May be called twice.

        Args:
            leaving: A line that stays where the panel was shown.
        """
        self._worker.stop()
        super().close(leaving)

    def wait(self, timeout: float = 60.0) -> bool:
        """Waits until nothing is being computed.

        Args:
            timeout: The longest wait, in seconds.

        Returns:
            False if the timeout passed first.
        """
        return self._worker.wait(timeout)


class SessionPanel(Panel):
    """A panel that shows the states a session publishes of one model, and sends clicks to the session as commands.

    Args:
        session: Runs the commands and publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest form that works here.
    """

    def __init__(self, session: Session, model_name: str | None, ui: Ui) -> None:
        super().__init__(ui)
        self._session = session
        self._name = model_name if model_name is not None else session.state.current
        self._unsubscribe: Callable[[], None] | None = None
        self._revision = -1

    @property
    def model_name(self) -> str | None:
        """The model shown."""
        return self._name

    @property
    def _key(self) -> Hashable:
        return (id(self._session), self._name)

    def _model(self) -> ModelState | None:
        return self._session.state.model(self._name)

    def _draw(self, state: SessionState) -> None:
        """Shows a state."""
        raise NotImplementedError

    def _command(self, *command: Any) -> None:
        self._guarded(lambda: self._run(*command), self._session.notices())

    def _opened(self) -> None:
        self._revision = -1
        self._unsubscribe = self._session.subscribe(self._published)
        self._published(self._session.state)

    def _release(self, parts: Any) -> None:
        with self._lock:
            unsubscribe, self._unsubscribe = self._unsubscribe, None
        if unsubscribe is not None:
            unsubscribe()

    def _published(self, state: SessionState) -> None:
        with self._lock:
            if self._parts is None or state.revision < self._revision:
                return
            self._revision = state.revision
            self._draw(state)


_open: dict[tuple[str, Hashable], Panel] = {}
"""The panels that are shown, by kind and key. Handlers have only weak references: this keeps the panels alive."""


_left: deque[Any] = deque()
"""Root widgets of panels that moved to another cell: each now shows a line. Only the latest are kept, because a cell
that is run again discards its own."""


def _line(words: str) -> dict[str, str]:
    """A MIME bundle with one line of text, shown in the place of a panel."""
    return {"text/html": to_html(line(dim(words))), "text/plain": words}


def _leave(root: Any, words: str) -> None:
    """Replaces the children of a root widget with a line of text."""
    import ipywidgets

    children = root.children
    root.children = (ipywidgets.HTML(_line(words)["text/html"]),)
    for child in children:
        close_tree(child)
    _left.append(root)
    while len(_left) > _LINES:
        close_tree(_left.popleft())


def close_panels() -> None:
    """Closes all panels."""
    for panel in list(_open.values()):
        panel.close()
    while _left:
        close_tree(_left.popleft())
