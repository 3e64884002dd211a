"""What the panels share that let adapters answer: they show themselves, follow the session, and tell errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.errors import BusyError, NbpeftError
from nbpeft.session import render
from nbpeft.state import ModelState, SessionState
from nbpeft.widgets import styles, views
from nbpeft.widgets.environment import WIDGET_VIEW, Ui, shown_as
from nbpeft.widgets.lifetime import close_tree, view_of
from nbpeft.widgets.worker import Worker

if TYPE_CHECKING:
    from nbpeft.session import Session
    from nbpeft.session.compared import CompareResult

AGAIN = "Run the cell again for buttons."

TokenizerSource = Callable[[], Any]
"""Called when a prompt is read; gives the tokenizer, or None."""


class AnswerPanel:
    """A panel whose answers come from a worker thread, so that the kernel stays free meanwhile.

    It shows itself as the last value of a cell, or with ``display``. The widgets are made when it is
    first shown. There is one panel of a kind for a model: showing a new one closes the one before.
    Without a kernel or without ipywidgets it is a card, or a line of text.

    Args:
        session: Takes the commands, publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest that works here.
        tokenizer: A tokenizer, or a function that gives one when a prompt is read; by default the
            one that the session was given last.
        prompt: To begin with.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        session: Session,
        model_name: str | None = None,
        *,
        ui: Ui = "auto",
        tokenizer: Any = None,
        prompt: str = "",
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._name = model_name if model_name is not None else session.state.current
        self._ui: Ui = ui
        self._source: TokenizerSource = (
            tokenizer if callable(tokenizer) and not hasattr(tokenizer, "decode") else (lambda: tokenizer)
        )
        self._lock = threading.RLock()
        self._worker = Worker()
        self._parts: Any = None
        self._unsubscribe: Callable[[], None] | None = None
        self._revision = -1
        self._closed = False

    @property
    def model_name(self) -> str | None:
        """The model shown."""
        return self._name

    @property
    def prompt(self) -> str:
        """What stands in the prompt box, or was asked last."""
        with self._lock:
            return str(self._parts.question.prompt) if self._parts is not None else self._prompt

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

    def close(self) -> None:
        """Stops answering, frees the widgets and stops following the session. May be called twice."""
        self._worker.stop()
        with self._lock:
            self._closed = True
            parts, self._parts = self._parts, None
            unsubscribe, self._unsubscribe = self._unsubscribe, None
            if _open.get(self._key) is self:
                del _open[self._key]
        if unsubscribe is not None:
            unsubscribe()
        if parts is not None:
            close_tree(parts.root)

    def wait(self, timeout: float = 30.0) -> bool:
        """Waits until no answer is on its way; says whether that came about."""
        return self._worker.wait(timeout)

    def __repr__(self) -> str:
        return self._text()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown = "html" if self._closed else shown_as(self._ui)
        bundle: dict[str, Any] = {"text/plain": self._text()}
        if shown != "text":
            bundle["text/html"] = self._card(render.line(render.dim(AGAIN)) if shown == "widgets" else "")
        if shown == "widgets":
            bundle["text/plain"] += f" {AGAIN}"
            bundle[WIDGET_VIEW] = view_of(self.widget)
        return bundle

    # For subclasses

    def _build(self) -> Any:
        """The widgets, with ``root``, ``message`` and ``question``."""
        raise NotImplementedError

    def _text(self) -> str:
        """One line of plain text."""
        raise NotImplementedError

    def _card(self, hint: str) -> str:
        """The panel as HTML that needs no widget."""
        raise NotImplementedError

    def _model(self) -> ModelState | None:
        return self._session.state.model(self._name)

    def _run(self, *command: Any) -> str:
        """Does what a widget asks for; returns what to say about it."""
        raise NotImplementedError

    def _ended(self) -> None:
        """Shows that no answer is on its way any more."""
        raise NotImplementedError

    def _halt(self) -> None:
        """Ends the answer that is on its way, which keeps what there is of it."""
        if self._worker.stop():
            self._ended()

    def _command(self, *command: Any) -> None:
        """What widgets call; handlers may run in another thread."""
        self._guarded(lambda: self._run(*command))

    def _guarded(self, act: Callable[[], str]) -> None:
        """Does something and shows what came of it, errors included."""
        try:
            words, colour = act(), styles.DIM
        except BusyError as error:
            words, colour = str(error), styles.WARN
        except NbpeftError as error:
            words, colour = str(error), styles.ERROR
        except Exception as error:  # in a handler it would be lost in a log
            words, colour = f"{type(error).__name__}: {error}", styles.ERROR
        with self._lock:
            if self._parts is None:
                return
            if words:
                self._parts.message.show(f'<span style="color:{colour}">{escape(words)}</span>')
            else:
                self._parts.message.clear()

    # State in

    @property
    def _key(self) -> tuple[int, str | None, str]:
        return (id(self._session), self._name, self.kind)

    def _open(self) -> None:
        before = _open.get(self._key)
        if before is not None:
            before.close()
        self._closed = False
        self._parts = self._build()
        _open[self._key] = self
        self._revision = -1
        self._unsubscribe = self._session.subscribe(self._published)
        self._published(self._session.state)

    def _published(self, state: SessionState) -> None:
        with self._lock:
            if self._parts is None or state.revision < self._revision:
                return
            self._revision = state.revision
            model = state.model(self._name)
            self._draw(model, views.missing_model(self._name) if model is None else "")

    def _draw(self, model: ModelState | None, missing: str) -> None:
        """Shows a state; ``missing`` says what to do where the model is gone."""
        raise NotImplementedError


def told(result: CompareResult | None) -> str:
    """What stands beside the title once no answer is on its way; an answer that failed says it below."""
    return "" if result is None or result.status == "running" else result.aside


_open: dict[tuple[int, str | None, str], AnswerPanel] = {}
"""The panels that are shown, by session, model and kind; handlers hold them weakly, so they are held here."""


def close_answer_panels() -> None:
    """Closes all of them."""
    for panel in list(_open.values()):
        panel.close()
