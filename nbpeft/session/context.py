"""The common context of a session's commands: the models, the lock, and publishing the state."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts, RunningBlock
from nbpeft._util.logs import collapsed
from nbpeft._util.subscribers import Subscribers
from nbpeft.errors import AdapterError, BusyError, in_one_line
from nbpeft.session.handles import is_module, uncompiled
from nbpeft.session.history import History
from nbpeft.session.lock import CommandLock
from nbpeft.session.registry import ModelRegistry, TrackedModel
from nbpeft.session.results import CommandResult
from nbpeft.session.variables import Variables
from nbpeft.state import PastState, SessionState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.runs.folder import RunFolder
    from nbpeft.session.background import BackgroundTraining
    from nbpeft.training import Run, TrainResult
    from nbpeft.training.watching.generation import Conversation

    ConfigLike = AdapterConfig | Mapping[str, Any]
    ModelLike = nn.Module | str | None
    Earlier = tuple[tuple[tuple[str, str], ...], Conversation]
    """(prompt, answer) of each turn of a conversation, and all its messages."""

_MOST_NOTES = 20
_RUNS_FOLDER = "nbpeft_runs"
_OFF = ("", "0", "off", "no", "none")
"""Values of the runs folder that disable saving runs."""
_FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)
"""Warnings that are not turned into notes."""


class SessionContext:
    """The state of one session and the protocol of its commands.

    Attributes:
        lock: allows one command at a time.
        models: the adapted models.
        variables: the notebook's variables, if there is a notebook.
        subscribers: called with every new state.
        run_subscribers: called with every run that starts.
        runs: model -> the run that is training it; the key is None for a model without adapters.
        background: model -> its last training in the background.
        last_result: result of the last training.
        tokenizers: base model -> the tokenizer that was last given for it.
        conversations: base model -> adapter -> its last conversation.
        qlora_origins: base model -> where ``qlora`` loaded it from, and how.
        last_traceback: traceback of the last command that failed, as text.
        last_error: error of the last command that failed, as JSON types.
        history: adapters that commands deleted or replaced.
        notes: errors outside of commands, e.g. in a subscriber.
        changed: whether there are changes that were not published yet.
        spelled: writes notes of a training in the notation of the command that starts it; set while a command runs.
        chosen_runs_folder: folder for runs as given; None for ``NBPEFT_RUNS``, or else ``nbpeft_runs`` in ``home``.
        home: working directory when the session was created.
    """

    def __init__(self) -> None:
        self.lock = CommandLock()
        self.models, self.history = ModelRegistry(self._model_changed), History()
        self.variables = Variables(
            self.models, self.history, self.publish, lambda: bool(self.lock.depth), self.run_with_adapter
        )
        self.models.watcher = self.variables
        self.subscribers, self.run_subscribers = Subscribers(), Subscribers()
        self.runs: dict[TrackedModel | None, Run] = {}
        self.background: weakref.WeakKeyDictionary[TrackedModel, BackgroundTraining] = weakref.WeakKeyDictionary()
        self.last_result: TrainResult | None = None
        self.tokenizers: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.conversations: weakref.WeakKeyDictionary[nn.Module, dict[str, Earlier]]
        self.conversations = weakref.WeakKeyDictionary()
        self.qlora_origins: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.last_traceback = ""
        self.last_error: dict[str, Any] | None = None
        self.notes: deque[str] = deque(maxlen=_MOST_NOTES)
        self.changed = False
        self.spelled: Callable[[str], str] = str
        self.chosen_runs_folder: str | None = None
        self.home = _working_directory()
        self._published_busy = False
        self._revision = 0
        self._last = SessionState()

    @property
    def state(self) -> SessionState:
        """The current state; while another thread runs a command, the last published one."""
        return self._look()[0]

    def _look(self) -> tuple[SessionState, bool]:
        """Returns the state, and whether it is the current one."""
        with self.lock.try_lock() as free:
            if not free:
                last = self._last
                return replace(last, busy=self.lock.busy), False
            current = self.models.current
            self._last = SessionState(
                models=tuple(tracked.state() for tracked in self.models.all()),
                current=current.name if current is not None else None,
                busy=self.lock.busy,
                revision=self._revision,
                notes=tuple(self.notes),
                past=tuple(PastState(past.name, past.words) for past in self.history.models),
            )
            return self._last, True

    def publish(self) -> None:
        """Sends the state to all subscribers."""
        self.changed = True  # if another thread runs a command, it publishes at its end
        self._revision += 1
        state, is_new = self._look()
        if is_new:
            self.changed = False
        self._published_busy = bool(state.busy)
        for failure in self.subscribers.notify(state):
            if failure not in self.notes:
                self.notes.append(failure)

    def command(
        self, description: str, *, slow: bool = False, gather: bool = True
    ) -> AbstractContextManager[list[str]]:
        """Context manager for a command: acquires the lock, collects warnings as notes, and publishes once at the end.

        Args:
            description: description of the command, for ``busy``.
            slow: also publish at the start, so that panels show the running command.
            gather: turn user warnings into notes.

        Returns:
            A context manager whose value is the list of notes, to which the command may add.

        Raises:
            BusyError: another thread runs a command.
        """
        # Catching warnings affects all threads, so it is not done while another thread trains.
        return _Command(self, description, slow, gather and self.training_in_background is None)

    def deciding(self) -> AbstractContextManager[list[str]]:
        """Context manager for a whole command: what it bases decisions on does not change until it ends.

        Raises:
            BusyError: another thread runs a command.
        """
        return _Command(self, "", slow=False, gather=False)

    def end_command(self) -> None:
        """Publish the changes of a command, if it was the outermost one."""
        if self.lock.depth == 0:
            self.models.release_handles()
        # A run may have published "busy" without changing anything, which has to be reset too.
        if self.lock.depth == 0 and (self.changed or self._published_busy):
            self.publish()

    def find(
        self, model: Any, variable: str | None = None, *, command: str = "", adapters: Iterable[object] = ()
    ) -> TrackedModel | None:
        """Return a model, and start to track it if it is already adapted; None for a bare model.

        Args:
            model: a model, a name, or None for the only model.
            variable: name for a model that the session does not know yet.
            command: as for ``ModelRegistry.get``.
            adapters: as for ``ModelRegistry.get``.

        Raises:
            AdapterError: it is not a model, the name is unknown, or a name is required.
        """
        if model is None or isinstance(model, str):
            return self.models.get(model, command=command, adapters=adapters)
        model = uncompiled(model)
        if not is_module(model):
            raise AdapterError(f"expected a model, or the name of one, not {model!r:.60}")
        self.variables.look()
        return self.models.find(model) or self.models.adopt(model, variable)

    def find_adapted(
        self, model: Any, variable: str | None = None, *, command: str = "", adapters: Iterable[object] = ()
    ) -> TrackedModel:
        """Return a model like ``find``, but refuse a bare one.

        ``command`` and ``adapters`` are those of ``ModelRegistry.get``.

        Raises:
            AdapterError: there is no such model, or it has no adapters.
        """
        tracked = self.find(model, variable, command=command, adapters=adapters)
        return tracked if tracked is not None else self.models.get(model)

    @property
    def runs_folder(self) -> Path | None:
        """Folder for runs; None if saving them is disabled."""
        chosen = (
            os.environ.get("NBPEFT_RUNS", _RUNS_FOLDER) if self.chosen_runs_folder is None else self.chosen_runs_folder
        )
        return None if is_off(chosen) else Path(self.home, os.path.expanduser(chosen))

    def run_name(self, run_id: str) -> str:
        """Return the present name of a run; empty if it is not in the folder for runs."""
        run = self._run(run_id)
        return "" if run is None else run.name

    def run_with_adapter(self, run_id: str) -> str:
        """Return the same of a run that is saved with an adapter."""
        run = self._run(run_id)
        return "" if run is None or not run.record().kept_steps else run.name

    def _run(self, run_id: str) -> RunFolder | None:
        from nbpeft.runs.store import RunStore

        place = self.runs_folder
        return None if place is None or not run_id else RunStore(place).with_id(run_id)

    def result(self, tracked: TrackedModel, line: str, notes: list[str]) -> CommandResult:
        """Return the result of a command that only reports one line."""
        if len(self.models.all()) > 1 and tracked.name not in line:
            line = f"{line} ({tracked.name})"
        return CommandResult(line, tracked.state(), notes=tuple(notes))

    @property
    def training_in_background(self) -> BackgroundTraining | None:
        """The training that is running in the background, or None."""
        return next((training for training in list(self.background.values()) if not training.ended), None)

    def refuse_another_training(self) -> None:
        """Refuse another training while one is running in the background.

        Raises:
            BusyError: one is running.
        """
        training = self.training_in_background
        if training is not None:
            raise BusyError.while_training(training.description)

    def end_trainings(self) -> None:
        """Stop trainings in the background, and wait for the end of their current step."""
        for training in list(self.background.values()):
            training.control.request_stop("the session was closed")
            training.join()

    def close(self) -> None:
        """End trainings in the background, and forget models and subscribers."""
        self.end_trainings()
        self.models.clear()
        self.variables.clear()
        self.history.clear()
        self.subscribers.clear()
        self.run_subscribers.clear()

    def _model_changed(self) -> None:
        """Publish now, or at the end of the running command."""
        self.changed = True
        self.history.forget_unloaded()
        if self.lock.depth == 0:
            self.publish()


def is_off(folder: str) -> bool:
    """Return whether a folder for runs says that none are saved: e.g. ``off`` or the empty text."""
    return folder.strip().lower() in _OFF


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return os.curdir


class _Command:
    """The context manager of ``SessionContext.command``.

    It is not a generator, because the ``finally`` part of a generator also runs when it is garbage collected, which
    would be at an arbitrary time if an interruption prevented ``__exit__``.
    """

    def __init__(self, context: SessionContext, description: str, slow: bool, gather: bool) -> None:
        self._context, self._slow, self._gather = context, slow, gather
        self._description = description
        self._entered = ExitStack()

    def __enter__(self) -> list[str]:
        notes: list[str] = []
        try:
            self._enter(notes, RunningBlock(__name__))
        except BaseException:
            self._context.end_command()
            raise
        return notes

    def _enter(self, notes: list[str], block: RunningBlock) -> None:
        context = self._context
        with DeferredInterrupts() as interrupts, ExitStack() as entered:
            command = context.lock.take(self._description, block)
            entered.callback(context.lock.give_back, command)
            if self._slow:
                with interrupts.released():
                    context.publish()
                context.changed = True
            if self._description:  # a block without a description has no result to show notices
                notes += context.variables.take_notices()
            entered.enter_context(collapsed())
            if self._gather:
                entered.enter_context(_WarningsAsNotes(notes, block))
            self._entered = entered.pop_all()

    def __exit__(self, *error: Any) -> None:
        try:
            with DeferredInterrupts():
                self._entered.__exit__(*error)
        finally:
            self._context.end_command()


class _WarningsAsNotes:
    """Turns user warnings into notes immediately, each one once; other warnings are issued again at the end.

    If an interruption prevents ``__exit__``, the next warning or the next command ends the collection.
    """

    def __init__(self, notes: list[str], block: RunningBlock) -> None:
        self._notes, self._block = notes, block
        self._others: list[tuple[Any, ...]] = []
        self._before: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        left = getattr(warnings.showwarning, "__self__", None)
        if isinstance(left, _WarningsAsNotes) and left._block.ended_before(self._block):
            left._end()
        self._before = warnings.catch_warnings()
        self._before.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._take

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._others.clear()
        self._end()

    def _take(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
    ) -> None:
        text = in_one_line(message)
        if not self._block.runs():
            self._others.append((message, category, filename, lineno))
            self._end()
        elif issubclass(category, _FOR_PROGRAMMERS):
            self._others.append((message, category, filename, lineno))
        elif text not in self._notes:
            self._notes.append(text)

    def _end(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            before.__exit__(None, None, None)
            for item in self._others:
                warnings.warn_explicit(*item)
