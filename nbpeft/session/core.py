"""Session: the one shared state of a notebook or a script. Commands in, ``SessionState`` out."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from nbpeft.confidential import masked
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
"""Characters."""


def _command(
    function: Callable[Concatenate[SessionContext, _Arguments], _Result],
) -> Callable[Concatenate[Session, _Arguments], _Result]:
    """Make a method of a command: the same arguments and docstring, with the session's context filled in.

    No other command of the session runs from its first look at the models on.
    """

    @functools.wraps(function)
    def method(self: Session, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with self.context.deciding(), self.context.models.deciding():
            return function(self.context, *args, **kwargs)

    return method


def _question(
    function: Callable[Concatenate[SessionContext, _Arguments], _Result],
) -> Callable[Concatenate[Session, _Arguments], _Result]:
    """Make a method of what may be called while a command runs: it changes no model, or takes the lock by itself."""

    @functools.wraps(function)
    def method(self: Session, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return function(self.context, *args, **kwargs)

    return method


class Session:
    """Commands on the adapted models of a notebook or a script.

    A model is known by the name of its variable and held weakly. Every command that takes
    ``model`` accepts that name, the model itself, or None for the only model that carries adapters;
    where several do, None is refused. When the model used last is unloaded or gone, the only one that is left takes
    its place, and that is noted; to merge or unload it has to be named. A command that fails leaves model, session and
    disk as they were; one that another thread runs meanwhile makes it raise ``BusyError`` at once.
    """

    def __init__(self) -> None:
        self.context = SessionContext()

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
    off = _command(switching.off)
    on = _command(switching.on)
    set_scale = _command(switching.set_scale)
    freeze = _command(switching.freeze)
    unfreeze = _command(switching.unfreeze)

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
    swap = _command(swapping.swap)

    # Training
    data = _question(data.data)
    train = _question(training.train)
    track = _question(training.track)
    result = _question(training.result)
    stop = _question(running.stop)
    clone = _question(running.clone)
    pause = _question(running.pause)
    go_on = _question(running.go_on)
    control = _question(training.control)
    export = _command(training.export)

    # Runs on disk
    runs = _question(run_commands.runs)
    resume = _command(run_commands.resume)
    kept_run = _question(run_commands.kept_run)
    rename_run = _question(run_commands.rename_run)
    delete_run = _question(run_commands.delete_run)

    # Memory
    memory = _question(inspecting.memory)
    measure = _question(inspecting.measure)
    plan_memory = _question(planning.plan_memory)
    memory_planner = _question(planning.memory_planner)

    # State

    @property
    def state(self) -> SessionState:
        """The state now; while another thread runs a command, the last one published."""
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
        """The traceback of the last command that failed, as text: it keeps no tensor alive."""
        return self.context.last_traceback

    def note_failure(self, error: BaseException) -> None:
        """Keep the traceback of an error as text, for ``last_traceback``; tokens in it are masked."""
        text = "".join(traceback.format_exception(error))
        self.context.last_traceback = masked(text[-_LONGEST_TRACEBACK:]).rstrip()

    def subscribe(self, callback: Callable[[SessionState], object]) -> Callable[[], None]:
        """Call back with every new state, until the returned function is called.

        Bound methods are held weakly. What a callback raises becomes a note of the state and
        breaks nothing.
        """
        return self.context.subscribers.add(callback)

    def on_run(self, callback: Callable[[Run, str], object]) -> Callable[[], None]:
        """Call back with each run that starts and its model's name, until the returned function is called."""
        return self.context.run_subscribers.add(callback)

    def refresh(self) -> SessionState:
        """Count parameters again (after ``requires_grad`` or parameters were changed by hand) and publish."""
        for tracked in self.context.models.all():
            tracked.recount()
        self.context.publish()
        return self.state

    def end_trainings(self) -> None:
        """Stop what trains in the background, and wait for the end of the step it is in."""
        self.context.end_trainings()

    def close(self) -> None:
        """End trainings in the background, and forget models and subscribers; the adapters stay in their models."""
        self.context.close()

    # Models

    def model(self, name: ModelLike = None, *, command: str = "") -> PeftModel:
        """Return the adapted model of that name (or of a model), the only one for None.

        Args:
            name: a name or a model.
            command: what it is for, for the message where several models carry adapters, e.g. ``unload``.

        Raises:
            AdapterError: there is none; the message names those there are.
        """
        return self.context.models.get(name, command=command).model

    def base(self, model: ModelLike = None) -> nn.Module:
        """Return the base model under the adapters."""
        base: nn.Module = self.context.models.get(model).manager.model
        return base

    def watch(self, model: nn.Module, *, name: str | None = None) -> str:
        """Track a model that was adapted without the session; returns its name here.

        Raises:
            AdapterError: it carries no adapters.
        """
        tracked = self.context.find_adapted(model, name)
        self.context.publish()
        return tracked.name

    def adopt(self, variables: Mapping[str, object]) -> None:
        """Follow the variables of a notebook from now on: before each command they are looked at.

        Adapted models among them are tracked; only one that is the first and only one becomes the current one. A model
        whose variable holds something else is called by another variable that holds it, or ``NAME (before)``. Of
        one that is gone, adapters that were trained and not saved are kept for ``undo``. ``notices`` says so. Cheap,
        and imports nothing: without ``nbpeft.model`` nothing can be adapted.
        """
        self.context.variables.watch(variables)

    # For front ends

    def notices(self) -> tuple[str, ...]:
        """What a person should know before the next command, e.g. that a variable holds another model; each once."""
        self.context.variables.look()
        return self.context.variables.take_notices()

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the models that are gone, and of which adapters can be brought back."""
        return self.context.history.model_names

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the models that a command without one may mean: those whose variable holds them."""
        return self.context.models.choices

    would_reuse = _question(quantizing.would_reuse)

    def unsaved(self, model: object) -> tuple[str, ...]:
        """Adapters of a model that were trained and are not saved; none for anything else."""
        tracked = self.context.models.find(uncompiled(model))
        return () if tracked is None else tuple(sorted(tracked.manager.unsaved))

    def unwritable(self, arguments: Mapping[str, Any]) -> list[str]:
        """Names of training arguments that ``export`` cannot write into a script."""
        from nbpeft.training.script import unwritable

        return unwritable(arguments)

    def fields(self, kind: str, method: str = "") -> Mapping[str, Field]:
        """Fields that a cell may set, for completion and help; none while torch is not imported, so that it is cheap.

        Args:
            kind: ``config``, ``training`` or ``qlora``.
            method: the method of a config; LoRA if empty.
        """
        return fields(kind, method)

    def method_names(self) -> tuple[str, ...]:
        """Names of the methods, for completion; none while torch is not imported."""
        return method_names() if "torch" in sys.modules else ()

    def run_names(self) -> tuple[str, ...]:
        """Names of the runs on disk, for completion; none while torch is not imported."""
        place = run_place(self.context) if "torch" in sys.modules else None
        return () if place is None else tuple(record.name for record in place.store.records())

    def combination_types(self, adapters: Iterable[str] = ()) -> tuple[str, ...]:
        """Ways to combine adapters, for completion: of those of the names that are adapters, else of LoRA."""
        names = set(adapters)
        configs = [
            config
            for tracked in self.context.models.all()
            for name, config in dict(tracked.manager.configs).items()
            if name in names
        ]
        return combination_types(configs) if configs else COMBINATION_TYPES

    def doctor(self) -> DoctorReport:
        """Report what is installed, what is wrong with it, and what to install."""
        from nbpeft.session.doctor import examine

        return examine()
