"""Session: the shared state of a notebook or a script. It has the commands, and publishes ``SessionState`` objects."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from nbpeft._util.former_names import former_function, refuse_former_names
from nbpeft.confidential import masked
from nbpeft.errors import CheckpointError, error_as_json
from nbpeft.names import COMBINATION_TYPES
from nbpeft.session.commands import (
    adapters,
    asking,
    combining,
    comparing,
    converting,
    data,
    inspecting,
    listing,
    merging,
    planning,
    pushing,
    quantizing,
    running,
    scoring,
    shipping,
    swapping,
    switching,
    training,
    undoing,
)
from nbpeft.session.commands import runs as run_commands
from nbpeft.session.commands.training import run_place
from nbpeft.session.configs import combination_types, method_names
from nbpeft.session.context import SessionContext
from nbpeft.session.description import describe
from nbpeft.session.fields import Field, fields
from nbpeft.session.handles import uncompiled

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.model import PeftModel
    from nbpeft.session.context import ModelLike
    from nbpeft.session.results import DoctorReport
    from nbpeft.state import SessionState
    from nbpeft.training import Run, TrainResult

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_LONGEST_TRACEBACK = 200_000
"""Maximal number of characters of a stored traceback."""


def _command(
    function: Callable[Concatenate[SessionContext, _Arguments], _Result],
) -> Callable[Concatenate[Session, _Arguments], _Result]:
    """Turn a command into a method with the same arguments and docstring, and the session's context filled in.

    The lock excludes the other commands of the session from the moment when the models are looked up.
    """

    @functools.wraps(function)
    def method(self: Session, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        refuse_former_names(function, kwargs)
        with self.context.deciding(), self.context.models.deciding():
            return function(self.context, *args, **kwargs)

    return method


def _unlocked(
    function: Callable[Concatenate[SessionContext, _Arguments], _Result],
) -> Callable[Concatenate[Session, _Arguments], _Result]:
    """Turn a function that changes no model, or acquires the lock itself, into a method callable during a command."""

    @functools.wraps(function)
    def method(self: Session, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        refuse_former_names(function, kwargs)
        return function(self.context, *args, **kwargs)

    return method


class Session:
    """Commands on the adapted models of a notebook or a script.

    A model is identified by the name of its variable and referenced weakly. Every command with an argument ``model``
    accepts that name, the model itself, or None for the only model that has adapters; None is refused if there are
    several. When the model used last is unloaded or deleted, the only remaining one is used instead, with a note;
    merging and unloading require its name then. A command that fails leaves model, session and disk unchanged; only a
    training that fails after its first step keeps what it learned until then. A command raises ``BusyError``
    immediately while another thread runs one.
    """

    def __init__(self) -> None:
        self.context = SessionContext()

    if not TYPE_CHECKING:  # a type checker would accept any name

        def __getattr__(self, name: str) -> Any:
            message = f"{type(self).__name__!r} object has no attribute {name!r}{former_function(name)}"
            raise AttributeError(message)

    # Adapters on a model
    add = _command(adapters.add)
    preview = _command(adapters.preview)
    qlora = _command(quantizing.qlora)
    preview_qlora = _command(quantizing.preview_qlora)
    load = _command(adapters.load)
    save = _command(adapters.save)
    push = _command(pushing.push)
    ship = _command(shipping.ship)
    delete = _command(adapters.delete)
    rename = _command(adapters.rename)
    copy = _command(adapters.copy)
    reset = _command(undoing.reset)
    undo = _command(undoing.undo)
    discard = _command(undoing.discard)
    inspect = _command(inspecting.inspect)
    methods = _command(listing.methods)

    # Which of them are active, and how strongly
    use = _command(switching.use)
    scale = _command(switching.scale)
    freeze = _command(switching.freeze)

    # Base weights
    merge = _command(merging.merge)
    unmerge = _command(merging.unmerge)
    unload = _command(merging.unload)

    # Several adapters
    combine = _command(combining.combine)
    convert = _command(converting.convert)
    ask = _command(asking.ask)
    compare = _command(comparing.compare)
    try_combination = _command(comparing.try_combination)
    score = _command(scoring.score)
    swap = _command(swapping.swap)

    # Training
    data = _unlocked(data.data)
    train = _unlocked(training.train)
    start_run = _unlocked(training.start_run)
    result = _unlocked(training.result)
    stop = _unlocked(running.stop)
    clone = _unlocked(running.clone)
    pause = _unlocked(running.pause)
    control = _unlocked(training.control)
    paused_training = _unlocked(running.paused_training)
    export = _command(training.export)

    # Runs on disk
    runs = _unlocked(run_commands.runs)
    runs_folder = _unlocked(run_commands.runs_folder)
    find_run = _unlocked(run_commands.find_run)
    resume = _unlocked(run_commands.resume)
    kept_run = _unlocked(run_commands.kept_run)
    rename_run = _unlocked(run_commands.rename_run)
    note_run = _unlocked(run_commands.note_run)
    delete_run = _unlocked(run_commands.delete_run)

    # Memory
    memory = _unlocked(inspecting.memory)
    measure = _unlocked(inspecting.measure)
    plan = _unlocked(planning.plan)
    memory_planner = _unlocked(planning.memory_planner)

    # State

    @property
    def state(self) -> SessionState:
        """The current state; while another thread runs a command, the last published one."""
        return self.context.state

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.context.models.names

    @property
    def last_result(self) -> TrainResult | None:
        """The result of the last training that finished, was stopped or interrupted; None before the first."""
        return self.context.last_result

    @property
    def last_traceback(self) -> str:
        """The traceback of the last command that failed, as text, so that it keeps no tensor alive."""
        return self.context.last_traceback

    @property
    def last_error(self) -> dict[str, Any] | None:
        """The error of the last command that failed, as ``NbpeftError.to_dict`` returns it; None if none failed."""
        return self.context.last_error

    def note_failure(self, error: BaseException) -> None:
        """Store the traceback of an error as text for ``last_traceback``; tokens in it are masked."""
        text = "".join(traceback.format_exception(error))
        self.context.last_traceback = masked(text[-_LONGEST_TRACEBACK:]).rstrip()
        self.context.last_error = error_as_json(error)

    def describe(self) -> str:
        """Return the state of the session as JSON of at most 4 kB, for programs that drive a notebook.

        It has the models with their adapters and trainings, the running command, the last result and error, and the
        folder for runs. If there is too much, the models and adapters in use come first, and ``…_left_out`` counts
        what is missing.
        """
        return describe(self.context)

    def subscribe(self, callback: Callable[[SessionState], object]) -> Callable[[], None]:
        """Call a function with every new state, until the returned function is called.

        Bound methods are referenced weakly. An error in a callback becomes a note of the state and has no other effect.
        """
        return self.context.subscribers.add(callback)

    def on_run(self, callback: Callable[[Run, str], object]) -> Callable[[], None]:
        """Call a function with each run that starts and its model's name, until the returned function is called."""
        return self.context.run_subscribers.add(callback)

    def refresh(self) -> SessionState:
        """Count parameters again, after ``requires_grad`` or parameters were changed directly, and publish."""
        for tracked in self.context.models.all():
            tracked.recount()
        self.context.publish()
        return self.state

    def end_trainings(self) -> None:
        """Stop trainings in the background, and wait for the end of their current step."""
        self.context.end_trainings()

    def close(self) -> None:
        """End trainings in the background, and forget models and subscribers; adapters stay on their models."""
        self.context.close()

    # Models

    def model(self, name: ModelLike = None, *, command: str = "", adapters: Iterable[object] = ()) -> PeftModel:
        """Return an adapted model by name or by a model; None for the only one, or the only one with some adapters.

        Args:
            name: a name or a model.
            command: name of the command, for the message if several models have adapters, e.g. ``unload``.
            adapters: names of adapters that the model has.

        Raises:
            AdapterError: there is no such model; the message has the available names.
        """
        return self.context.models.get(name, command=command, adapters=adapters).model

    def base(self, model: ModelLike = None) -> nn.Module:
        """Return the base model without the PeftModel."""
        base: nn.Module = self.context.models.get(model).manager.model
        return base

    def register(self, model: nn.Module, *, name: str | None = None) -> str:
        """Register a model that was adapted without the session, and return its name.

        Args:
            model: the adapted model.
            name: name of its variable; None for a free name.

        Raises:
            AdapterError: the model has no adapters.
        """
        tracked = self.context.find_adapted(model, name)
        self.context.publish()
        return tracked.name

    def adopt(self, variables: Mapping[str, object]) -> None:
        """Watch the variables of a notebook; from now on they are examined before each command.

        Adapted models among them are tracked; the first one becomes the current model if it is the only one. If the
        variable of a model gets another value, the model is named after another variable that refers to it, or
        ``NAME (before)``. If a model no longer exists, its trained and unsaved adapters are preserved for ``undo``.
        ``notices`` reports both. This is fast and imports nothing: without ``nbpeft.model`` there are no adapted
        models.
        """
        self.context.variables.watch(variables)

    # For front ends

    def notices(self) -> tuple[str, ...]:
        """Return messages for the user before the next command, e.g. that a variable has another model; each once."""
        self.context.variables.look()
        return self.context.variables.take_notices()

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of models that no longer exist, and whose adapters can be restored."""
        return self.context.history.model_names

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the models that a command without a name can refer to: those whose variable refers to them."""
        return self.context.models.choices

    would_reuse = _unlocked(quantizing.would_reuse)

    def unsaved(self, model: object) -> tuple[str, ...]:
        """Return the adapters of a model that were trained and are not saved; empty for anything else."""
        tracked = self.context.models.find(uncompiled(model))
        return () if tracked is None else tuple(sorted(tracked.manager.unsaved))

    def unwritable(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return the names of training arguments that ``export`` cannot write into a script."""
        from nbpeft.training.script import unwritable

        return unwritable(arguments)

    def fields(self, kind: str, method: str = "") -> Mapping[str, Field]:
        """Return the fields that a cell may set, for completion and help; empty before torch is imported, to be fast.

        Args:
            kind: ``config``, ``training`` or ``qlora``.
            method: the method of a config; LoRA if empty.
        """
        return fields(kind, method)

    def method_names(self) -> tuple[str, ...]:
        """Return the names of the methods, for completion; empty before torch is imported."""
        return method_names() if "torch" in sys.modules else ()

    def run_names(self) -> tuple[str, ...]:
        """Return the names of the runs on disk, for completion; empty before torch is imported, or if unreadable."""
        place = run_place(self.context) if "torch" in sys.modules else None
        try:
            return () if place is None else tuple(record.name for record in place.store.records())
        except CheckpointError:
            return ()

    def combination_types(self, adapters: Iterable[str] = ()) -> tuple[str, ...]:
        """Return combination types for completion: those of the given adapters, or else those of LoRA."""
        names = set(adapters)
        configs = [
            config
            for tracked in self.context.models.all()
            for name, config in dict(tracked.manager.configs).items()
            if name in names
        ]
        return combination_types(configs) if configs else COMBINATION_TYPES

    def doctor(self) -> DoctorReport:
        """Report what is installed, which problems there are, and what to install."""
        from nbpeft.session.doctor import examine

        return examine()
