"""Session: the one shared state of a notebook or a script. Commands in, ``SessionState`` out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from nbpeft.names import COMBINATION_TYPES
from nbpeft.session.commands import (
    adapters,
    combining,
    comparing,
    inspecting,
    merging,
    planning,
    quantizing,
    swapping,
    switching,
    training,
)
from nbpeft.session.configs import combination_types, method_names
from nbpeft.session.context import SessionContext
from nbpeft.session.fields import Field, fields
from nbpeft.session.handles import is_handle, is_live

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.model import PeftModel
    from nbpeft.session.context import ModelLike
    from nbpeft.session.results import DoctorReport
    from nbpeft.state import SessionState
    from nbpeft.training import Run

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _command(
    function: Callable[Concatenate[SessionContext, _Arguments], _Result],
) -> Callable[Concatenate[Session, _Arguments], _Result]:
    """Make a method of a command: the same arguments and docstring, with the session's context filled in."""

    @functools.wraps(function)
    def method(self: Session, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return function(self.context, *args, **kwargs)

    return method


class Session:
    """Commands on the adapted models of a notebook or a script.

    A model is known by the name of its variable and held weakly. Every command that takes
    ``model`` accepts that name, the model itself, or None for the current model: the one that was
    adapted, loaded into, trained or switched last. When that one is unloaded or gone, no other takes its place
    until a command names one. Commands that take something away (``merge``, ``unmerge``, ``unload``,
    ``delete``, ``rename``, ``combine``, ``swap``, ``train``) refuse None where several models carry
    adapters. A command that fails leaves model, session and disk as they were; one that another
    thread runs meanwhile makes it raise ``BusyError`` at once.
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
    delete = _command(adapters.delete)
    rename = _command(adapters.rename)
    copy = _command(adapters.copy)
    inspect = _command(inspecting.inspect)

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
    compare = _command(comparing.compare)
    try_combination = _command(comparing.try_combination)
    swap = _command(swapping.swap)

    # Training and memory
    train = _command(training.train)
    track = _command(training.track)
    control = _command(training.control)
    export = _command(training.export)
    memory = _command(inspecting.memory)
    plan_memory = _command(planning.plan_memory)
    memory_planner = _command(planning.memory_planner)

    # State

    @property
    def state(self) -> SessionState:
        """The state now; while another thread runs a command, the last one published."""
        return self.context.state

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.context.models.names

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

    def close(self) -> None:
        """Forget models and subscribers; the adapters stay in their models."""
        self.context.close()

    # Models

    def model(self, name: ModelLike = None, *, command: str = "") -> PeftModel:
        """Return the adapted model of that name (or of a model), the current one for None.

        Args:
            name: a name or a model.
            command: a command that takes something away from it, e.g. ``unload``; None is refused then where
                several models carry adapters.

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
        """Track the adapted models among variables that are not tracked yet.

        A model that was forgotten under a name keeps the newest variable's name. Only a model that
        is the first and only one becomes the current one. Cheap, and imports nothing: without
        ``nbpeft.model`` nothing can be adapted.
        """
        if "nbpeft.model" not in sys.modules:
            return
        models = self.context.models
        known = models.all()
        new = []
        for name, value in list(variables.items()):
            if not name.startswith("_") and is_handle(value):
                handle: Any = value
                if is_live(handle) and models.find(handle) is None:
                    new.append(models.add(name, handle, select=False))
        if len(new) == 1 and not known:
            models.select(new[0])
        if new:
            self.context.publish()

    # For front ends

    would_reuse = _command(quantizing.would_reuse)

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

    def combination_types(self, adapters: Iterable[str] = ()) -> tuple[str, ...]:
        """Ways to combine adapters, for completion: of those of the names that are adapters, else of LoRA."""
        names = set(adapters)
        configs = [
            config
            for tracked in self.context.models.all()
            for name, config in tracked.manager.configs.items()
            if name in names
        ]
        return combination_types(configs) if configs else COMBINATION_TYPES

    def doctor(self) -> DoctorReport:
        """Report what is installed, what is wrong with it, and what to install."""
        from nbpeft.session.doctor import examine

        return examine()
