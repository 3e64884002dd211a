"""The adapters of one model: what is there, what it costs, and buttons to switch, save and delete.

    session ── SessionState ──> AdaptersPanel ── draws only what changed ──> widgets
       ^                                                                        |
       └──────────── use, off, save, delete, memory ── a click ─────────────────┘

The panel never changes what it shows by itself: it asks the session and waits for the next state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from nbpeft.errors import BusyError, NbpeftError
from nbpeft.state import ModelState, SessionState
from nbpeft.widgets import styles, views
from nbpeft.widgets.environment import WIDGET_VIEW, Ui, shown_as
from nbpeft.widgets.lifetime import close_tree, view_of, weakly

if TYPE_CHECKING:
    from nbpeft.session import Session

AGAIN = "Run the cell again for buttons."


class AdaptersPanel:
    """Shows itself as the last value of a cell, or with ``display``.

    The widgets are made when the panel is first shown. There is one panel a model: showing a new
    one closes the one before. Without a kernel or without ipywidgets it is a table, or a line of text.

    Args:
        session: Takes the commands, publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest that works here.
        tokenizer: For the compare and the blend panel that open below: a tokenizer, or a function that
            gives one; by default the one that the session was given last.
    """

    def __init__(
        self, session: Session, model_name: str | None = None, *, ui: Ui = "auto", tokenizer: Any = None
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._name = model_name if model_name is not None else session.state.current
        self._ui: Ui = ui
        self._lock = threading.RLock()
        self._revision = -1
        self._parts: _Parts | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._closed = False

    @property
    def model_name(self) -> str | None:
        """The model shown."""
        return self._name

    @property
    def widget(self) -> Any:
        """The root widget, to be placed among other widgets; made on first use.

        Raises:
            ModuleNotFoundError: ipywidgets is not installed.
        """
        with self._lock:
            if self._parts is None:
                self._open()
            assert self._parts is not None
            return self._parts.root

    def close(self) -> None:
        """Frees the widgets and stops following the session. May be called twice."""
        with self._lock:
            self._closed = True
            parts, self._parts = self._parts, None
            unsubscribe, self._unsubscribe = self._unsubscribe, None
            key = (id(self._session), self._name)
            if _open.get(key) is self:
                del _open[key]
        if unsubscribe is not None:
            unsubscribe()
        if parts is not None:
            parts.drawer.close()
            close_tree(parts.root)

    def __repr__(self) -> str:
        return views.model_text(self._model(), self._name)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        model = self._model()
        bundle: dict[str, Any] = {"text/plain": views.model_text(model, self._name)}
        shown = "html" if self._closed else shown_as(self._ui)
        if shown != "text":
            bundle["text/html"] = views.model_card(model, self._name, hint=AGAIN if shown == "widgets" else "")
        if shown == "widgets":
            bundle["text/plain"] += f" {AGAIN}"
            bundle[WIDGET_VIEW] = view_of(self.widget)
        return bundle

    def _model(self) -> ModelState | None:
        return self._session.state.model(self._name)

    def _open(self) -> None:
        key = (id(self._session), self._name)
        before = _open.get(key)
        if before is not None:
            before.close()
        self._closed = False
        self._parts = _Parts(self._command, self._session, self._name, self._tokenizer)
        _open[key] = self
        self._revision = -1
        self._unsubscribe = self._session.subscribe(self._published)
        self._published(self._session.state)

    # State in

    def _published(self, state: SessionState) -> None:
        with self._lock:
            if self._parts is None or state.revision < self._revision:
                return
            self._revision = state.revision
            self._parts.draw(state.model(self._name), self._name, state.busy)

    # Commands out; handlers may run in another thread

    def _command(self, command: str, *arguments: str) -> None:
        try:
            words = self._run(command, *arguments)
        except BusyError as error:
            self._say(str(error), styles.WARN)
        except NbpeftError as error:
            self._say(str(error), styles.ERROR)
        except Exception as error:  # in a handler it would be lost in a log
            self._say(f"{type(error).__name__}: {error}", styles.ERROR)
        else:
            self._say(words, styles.DIM)

    def _run(self, command: str, *arguments: str) -> str:
        """Asks the session; returns what to say about it."""
        session, model = self._session, self._name
        if command == "use":
            return _notes(session.use(arguments[0], model=model))
        if command == "off":
            return _notes(session.off(model=model))
        if command == "delete":
            return str(session.delete(arguments[0], model=model))
        if command == "save":
            name, folder = arguments
            if not folder:
                raise NbpeftError(f"Give a folder to save {name!r} to.")
            return str(session.save(folder, name=name, model=model))
        session.memory(model)
        return ""

    def _say(self, words: str, colour: str) -> None:
        with self._lock:
            if self._parts is None:
                return
            if words:
                self._parts.message.show(f'<span style="color:{colour}">{escape(words)}</span>')
            else:
                self._parts.message.clear()


class _Parts:
    """The widgets of a panel."""

    def __init__(self, command: Callable[..., None], session: Session, name: str | None, tokenizer: Any) -> None:
        import ipywidgets

        from nbpeft.widgets import panel_parts as parts
        from nbpeft.widgets.drawer import Drawer

        self.drawer = Drawer(session, name, tokenizer)

        self._head = parts.html()
        self._choices = parts.Choices(command)
        self._rows = parts.Rows(command)
        self._empty = parts.html()
        self._totals = parts.html()
        self._memory = parts.html()
        self._refresh = parts.small_button(
            "measure memory", "Measure what the model uses now", "116px", weakly(command, "memory")
        )
        self.message = parts.Message()
        style = parts.html(f"<style>{styles.PANEL_CSS}</style>", display="none")
        buttons = ipywidgets.HBox([self._refresh, self.drawer.buttons], layout=ipywidgets.Layout(flex="0 0 auto"))
        foot = ipywidgets.HBox(
            [self._totals, buttons],
            layout=ipywidgets.Layout(justify_content="space-between", align_items="flex-end"),
        )
        below = [foot, self._memory, self.message.box, self.drawer.slot]
        self.root = ipywidgets.VBox([style, self._head, self._choices.box, self._rows.box, self._empty, *below])
        self.root.add_class("nbpeft-panel")

    def draw(self, model: ModelState | None, name: str | None, busy: str) -> None:
        """Shows a state; widgets whose value stays send nothing."""
        self._head.value = views.panel_head(model, name, busy)
        if model is None:
            model = ModelState(name or "", "", "", "", 0, 0)
            self._empty.value = views.panel_note(views.missing_model(name))
            self._totals.value = self._memory.value = ""
        else:
            self._empty.value = "" if model.adapters else views.panel_note(views.no_adapters(model))
            self._totals.value = views.totals(model)
            self._memory.value = views.memory_bar(model.memory) if model.memory is not None else ""
        self._choices.draw(model)
        self._rows.draw(model)
        visible = None if model.adapters else "none"
        for part in (self._choices.box, self._refresh, self.drawer.buttons):
            part.layout.display = visible


def _notes(result: Any) -> str:
    """What a result tells besides that it was done."""
    return " ".join(getattr(result, "notes", ()))


_open: dict[tuple[int, str | None], AdaptersPanel] = {}
"""The panels that are shown, by session and model; handlers hold them weakly, so they are held here."""


def close_panels() -> None:
    """Closes all panels."""
    for panel in list(_open.values()):
        panel.close()
