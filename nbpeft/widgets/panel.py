"""What every panel shares: it shows itself, is one of its kind for its model, and shows errors."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Tone, dim, line
from nbpeft.display.html import to_html
from nbpeft.errors import BusyError, NbpeftError
from nbpeft.state import ModelState, SessionState
from nbpeft.widgets.environment import Ui, shown_as
from nbpeft.widgets.lifetime import close_tree
from nbpeft.widgets.panel_output import PanelOutput
from nbpeft.widgets.styles import style_sheet

if TYPE_CHECKING:
    from nbpeft.session import Session

AGAIN = "Run the cell again for buttons."
MOVED = "This panel was opened again in another place; run this cell again to have it here."
_LINES = 16


class Panel:
    """Shows itself as the last value of a cell, or with ``display``.

    The widgets are made when the panel is first shown. There is one panel of a kind for a model:
    showing a new one closes the one before. Without a kernel or without ipywidgets it is a card, or a
    line of text; that is also what a saved notebook keeps, in its last state.

    Args:
        ui: How to show it; by default the richest that works here.
    """

    kind: ClassVar[str]

    def __init__(self, ui: Ui) -> None:
        self._ui: Ui = ui
        self._lock = threading.RLock()
        self._parts: Any = None
        self._output: PanelOutput | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it was closed since it was shown last."""
        return self._closed

    @property
    def widget(self) -> Any:
        """The root widget, to be placed among other widgets; made on first use.

        Raises:
            ModuleNotFoundError: ipywidgets is not installed.
        """
        with self._lock:
            if self._parts is None:
                self._open()
            return self._parts.root

    def close(self, leaving: str = "") -> None:
        """Frees the widgets. May be called twice.

        Args:
            leaving: A line that stays where the panel was shown.
        """
        with self._lock:
            output, self._output = self._output, None
            if output is not None:
                output.close(_line(leaving) if leaving else None)
            self._closed = True
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
        if self._closed or shown_as(self._ui) != "widgets":
            raise NotImplementedError  # IPython asks for the bundle then
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
        return self._state("" if shown_as(self._ui) == "html" else AGAIN)

    # For subclasses

    @property
    def _key(self) -> Hashable:
        """What there is one panel of this kind for."""
        raise NotImplementedError

    def _build(self) -> Any:
        """The widgets, with ``root`` and ``message``."""
        raise NotImplementedError

    def _opened(self) -> None:
        """Shows the first state; called once the widgets are there."""
        raise NotImplementedError

    def _release(self, parts: Any) -> None:
        """Gives back what the panel took besides widgets."""

    def _text(self) -> str:
        """Plain text."""
        raise NotImplementedError

    def _card(self, hint: str) -> Block:
        """The panel without widgets; ``hint`` is a line at its end."""
        raise NotImplementedError

    def card(self) -> Block:
        """The panel without widgets, as it is now."""
        return self._card("")

    def _changed(self) -> None:
        """Has what a saved notebook keeps follow what is shown."""
        if self._output is not None:
            self._output.changed()
        self.on_change()

    def _state(self, hint: str = AGAIN) -> dict[str, str]:
        """What is shown, as a MIME bundle that needs no widget."""
        text = self._text()
        separator = "\n" if "\n" in text else " "
        plain = separator.join(part for part in (text, hint) if part)
        return {"text/html": to_html(self._card(hint)), "text/plain": plain}

    def _failed(self) -> None:
        """Takes back what a command that failed had begun to show."""

    # Opening, and telling what came of a command; handlers may run in another thread

    @property
    def _place(self) -> tuple[str, Hashable]:
        return (self.kind, self._key)

    def _open(self) -> None:
        before = _open.get(self._place)
        if before is not None and before is not self:
            before.close(MOVED)
        self._closed = False
        self._parts = self._build()
        _open[self._place] = self
        self._opened()

    def _guarded(self, act: Callable[[], str], notices: Sequence[str] = ()) -> None:
        """Does something and shows what came of it, errors included.

        Args:
            act: Does it; returns what to say.
            notices: What to say before that.
        """
        tone: Tone
        try:
            words = act()
            self._say(" ".join((*notices, words)).strip(), "warning" if notices else "dim")
            return
        except NbpeftError as error:
            words = str(error)
            tone = "warning" if isinstance(error, BusyError) else "error"
        except Exception as error:  # in a handler it would be lost in a log
            words, tone = f"{type(error).__name__}: {error}", "error"
        with self._lock:
            if self._parts is not None:
                self._failed()
        self._say(" ".join((*notices, words)), tone)

    def _say(self, words: str, tone: Tone) -> None:
        """Shows a message; none for the empty string."""
        with self._lock:
            if self._parts is None:
                return
            if words:
                self._parts.message.show(words, tone)
            else:
                self._parts.message.clear()


class SessionPanel(Panel):
    """A panel that follows what a session publishes of one model, and asks the session for what is clicked.

    Args:
        session: Takes the commands, publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest that works here.
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

    def _run(self, *command: Any) -> str:
        """Does what a widget asks for; returns what to say about it."""
        raise NotImplementedError

    def _draw(self, state: SessionState) -> None:
        """Shows a state."""
        raise NotImplementedError

    def _command(self, *command: Any) -> None:
        """What widgets call."""
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
"""The panels that are shown, by kind and what they show; handlers hold them weakly, so they are held here."""


_left: deque[Any] = deque()
"""Roots of panels that moved and left a line; only the last ones, because a cell that is run again hides its own."""


def _line(words: str) -> dict[str, str]:
    """A line in the place of a panel."""
    return {"text/html": to_html(line(dim(words))), "text/plain": words}


def _leave(root: Any, words: str) -> None:
    """Puts a line in the place of all a root holds."""
    import ipywidgets

    children = root.children
    root.children = (ipywidgets.HTML(_line(words)["text/html"]),)
    for child in children:
        close_tree(child)
    _left.append(root)
    while len(_left) > _LINES:
        close_tree(_left.popleft())


def close_panels() -> None:
    """Closes all of them."""
    for panel in list(_open.values()):
        panel.close()
    while _left:
        close_tree(_left.popleft())
