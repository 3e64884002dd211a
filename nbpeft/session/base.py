"""What every command of a session rests on: the lock, the models, and publishing their state."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, in_one_line
from nbpeft.logs import collapsed
from nbpeft.session.book import Entry, ModelBook
from nbpeft.session.handles import handle_over, is_handle, is_live, is_module, uncompiled
from nbpeft.session.lock import CommandLock, Subscribers
from nbpeft.session.results import CommandResult
from nbpeft.state import SessionState

if TYPE_CHECKING:
    from torch import nn

_NOTES = 20
_SILENT = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)
"""Warnings for programmers; they go their usual way and are no notes."""


class SessionBase:
    """State, subscribers and the command protocol; the commands are in the subclass."""

    def __init__(self) -> None:
        self.lock = CommandLock()
        self._subscribers = Subscribers()
        self._book = ModelBook(self._model_changed)
        self._notes: deque[str] = deque(maxlen=_NOTES)
        self._revision = 0
        self._stale = False
        self._told_busy = False
        self._last = SessionState()

    # State

    @property
    def state(self) -> SessionState:
        """The state now; while another thread runs a command, the last one published."""
        with self.lock.glance() as free:
            if not free:
                return SessionState(
                    self._last.models, self._last.current, self.lock.busy, self._last.revision, self._last.notes
                )
            current = self._book.current
            self._last = SessionState(
                models=tuple(entry.state() for entry in self._book.entries()),
                current=current.name if current is not None else None,
                busy=self.lock.busy,
                revision=self._revision,
                notes=tuple(self._notes),
            )
            return self._last

    def subscribe(self, callback: Callable[[SessionState], object]) -> Callable[[], None]:
        """Calls back with every new state, until the returned function is called.

        Bound methods are held weakly. What a callback raises becomes a note of the state and
        breaks nothing.
        """
        return self._subscribers.add(callback)

    def refresh(self) -> SessionState:
        """Counts parameters anew (after ``requires_grad`` or parameters were changed by hand) and publishes."""
        for entry in self._book.entries():
            entry.recount()
        self._publish()
        return self.state

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(entry.name for entry in self._book.entries())

    def watch(self, model: nn.Module, *, name: str | None = None) -> str:
        """Takes up a model that was adapted without the session; returns its name here.

        Raises:
            AdapterError: it carries no adapters.
        """
        entry = self._entry_of(model, name)
        entry = entry if entry is not None else self._book.get(model)
        self._publish()
        return entry.name

    def adopt(self, variables: Mapping[str, object]) -> None:
        """Takes up the adapted models among variables that it does not know yet.

        A model that was forgotten under a name keeps the newest variable's name. Only the first
        model there is becomes the current one: others are named. Cheap, and imports nothing: without
        ``nbpeft.model`` nothing can be adapted.
        """
        if "nbpeft.model" not in sys.modules:
            return
        known = self._book.entries()
        new: list[Entry] = []
        for name, value in list(variables.items()):
            if not name.startswith("_") and is_handle(value):
                handle: Any = value
                if is_live(handle) and self._book.find(handle) is None:
                    new.append(self._book.take_up(name, handle))
        if len(new) == 1 and not known:
            self._book.enter(None, new[0].model)
        if new:
            self._publish()

    def close(self) -> None:
        """Forgets models and subscribers; the adapters stay in their models."""
        self._book.clear()
        self._subscribers.clear()

    # For commands

    @contextmanager
    def _command(self, words: str, *, slow: bool = False, gather: bool = True) -> Iterator[list[str]]:
        """Runs one command: takes the lock, gathers warnings as notes, publishes once at the end.

        Args:
            words: what is done, for ``busy``.
            slow: publish at the start as well, so that panels show what is running.
            gather: turn user warnings into notes.

        Raises:
            BusyError: another thread runs a command.
        """
        try:
            with self.lock.command(words):
                self._stale = self._stale or slow
                if slow:
                    self._tell()
                notes: list[str] = []
                with collapsed(), _gathered(notes) if gather else nullcontext():
                    yield notes
        finally:
            # What a run publishes meanwhile says busy, too, and leaves nothing stale.
            if self.lock.depth == 0 and (self._stale or self._told_busy):
                self._publish()

    def _entry_of(self, model: Any, variable: str | None = None) -> Entry | None:
        """The entry of a model, made where the model is adapted already; None for a bare model."""
        if model is None or isinstance(model, str):
            return self._book.get(model)
        model = uncompiled(model)
        if not is_module(model):
            raise AdapterError(f"expected a model, or the name of one, not {model!r:.60}")
        entry = self._book.find(model)
        if entry is None:
            handle: Any = model if is_handle(model) else handle_over(model)
            if handle is not None:
                handle._check_live()
                entry = self._book.enter(variable, handle)
        return entry

    def _adapted(self, what: str, model: Any) -> Entry:
        """The entry of an adapted model, for a command that takes something away; see ``ModelBook.get_for``."""
        entry = None if model is None else self._entry_of(model)
        return entry if entry is not None else self._book.get_for(what, model)

    def _done(self, entry: Entry, line: str, notes: list[str]) -> CommandResult:
        if len(self._book.entries()) > 1 and entry.name not in line:
            line = f"{line} ({entry.name})"
        return CommandResult(line, entry.state(), tuple(notes))

    def _model_changed(self) -> None:
        """A manager changed: publish now, or once at the end of the running command."""
        self._stale = True
        if self.lock.depth == 0:
            self._publish()

    def _publish(self) -> None:
        self._stale = False
        self._tell()

    def _tell(self) -> None:
        self._revision += 1
        state = self.state
        self._told_busy = bool(state.busy)
        for failure in self._subscribers.tell(state):
            if failure not in self._notes:
                self._notes.append(failure)


@contextmanager
def _gathered(notes: list[str]) -> Iterator[None]:
    """Turns user warnings into notes as they come, each once; other warnings go their usual way."""
    others: list[tuple[Any, ...]] = []

    def take(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        text = in_one_line(message)
        if issubclass(category, _SILENT):
            others.append((message, category, filename, lineno))
        elif text not in notes:
            notes.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = take
        yield
    for item in others:
        warnings.warn_explicit(*item)
