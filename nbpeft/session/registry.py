"""The models that a session knows, by the name of their notebook variable, held weakly."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, did_you_mean
from nbpeft.session.configs import meaning
from nbpeft.session.handles import is_live, uncompiled
from nbpeft.session.snapshot import Snapshots
from nbpeft.state import MemberState, MemoryState, ModelState, TrainState

if TYPE_CHECKING:
    from nbpeft.engine.adapter import AdapterConfig
    from nbpeft.engine.manager import AdapterManager
    from nbpeft.memory import Meter
    from nbpeft.model import PeftModel
    from nbpeft.session.trained import TrainingCall
    from nbpeft.training import Run


class TrackedModel:
    """One adapted model: weak references and what the session remembers of it.

    Attributes:
        name: of the notebook variable.
        memory: the last measurement.
        training: the state of the last run.
        training_call: what that run was started with, where ``train`` started it.
        trained_on_plain_text: whether the text it was last trained on had no chat template around it.
        requested: adapter name -> its config, and the fields that were asked for when it was made.
        trained_steps: adapter name -> its config, the steps it was trained for, and the run that did the last of them.
        first_random: adapter name -> its config, and the random numbers that its first weights were drawn with.
        sweep: adapters that a cell made for several values, until they are trained.
        origins: adapter of a sweep -> the adapter that it started from.
    """

    def __init__(self, name: str, model: PeftModel, changed: Callable[[], None]) -> None:
        self.name = name
        self.memory: MemoryState | None = None
        self.training: TrainState | None = None
        self.training_call: TrainingCall | None = None
        self.trained_on_plain_text = False
        self.requested: dict[str, tuple[AdapterConfig, dict[str, Any]]] = {}
        self.trained_steps: dict[str, tuple[AdapterConfig, int, str]] = {}
        self.first_random: dict[str, tuple[AdapterConfig, Any]] = {}
        self.sweep: tuple[str, ...] = ()
        self.origins: dict[str, str] = {}
        self._model = weakref.ref(model)
        self._manager = weakref.ref(model.manager)
        self._snapshots = Snapshots()
        self._meter: Meter | None = None
        self._changed = changed
        model.manager.subscribe(self.on_change)

    def requested_fields(self, name: str) -> dict[str, Any]:
        """The fields that an adapter was made with, or else those of its config."""
        present = self.manager.configs[name]
        config, fields = self.requested.get(name, (None, {}))
        return fields if config is present else meaning(present)

    def steps_of(self, names: Iterable[str]) -> tuple[int, str]:
        """How many steps adapters were trained for since they were made or loaded, and the last run that did."""
        configs = [self.manager.configs[name] for name in names]
        found = [item for item in self.trained_steps.values() if any(item[0] is config for config in configs)]
        return max(((steps, run) for _, steps, run in found), default=(0, ""))

    def with_clones(self, names: tuple[str, ...], members: Iterable[MemberState]) -> tuple[str, ...]:
        """The adapters that a training began with, and those that were cloned in it, which start from where they do."""
        clones = [member.name for member in members if member.name not in names]
        origin = next((self.origins[name] for name in names if name in self.origins), None)
        self.origins |= {name: origin for name in clones if origin is not None}
        return (*names, *clones)

    def count_steps(self, names: Iterable[str], run: Run) -> None:
        """Remember that a run trained adapters."""
        for name in names:
            state = run.state
            steps = run.steps_before + (state.step if state.kept_step is None else state.kept_step)
            self.trained_steps[name] = (self.manager.configs[name], steps, os.path.basename(run.folder))

    def on_change(self) -> None:
        """Report a change of the adapters; a method, because managers hold those weakly."""
        self._changed()

    @property
    def alive(self) -> bool:
        """Whether the model still exists and is still adapted."""
        model = self._model()
        return model is not None and is_live(model)

    @property
    def model(self) -> PeftModel:
        """The model.

        Raises:
            AdapterError: it is gone.
        """
        model = self._model()
        if model is None:
            raise AdapterError(f"the model {self.name!r} is gone: no variable holds it any more")
        return model

    @property
    def manager(self) -> AdapterManager:
        """Its adapters."""
        return self.model.manager

    def matches(self, thing: object) -> bool:
        """Whether something is this model, its base model, its manager or another handle on them."""
        manager = self._manager()
        return manager is not None and (
            thing is self._model()
            or thing is manager
            or thing is manager.model
            or getattr(thing, "manager", None) is manager
        )

    def state(self) -> ModelState:
        """The model's state now."""
        return self._snapshots.build(self.name, self.manager, memory=self.memory, training=self.training)

    def measure(self) -> MemoryState:
        """Memory in use now."""
        from nbpeft.memory import Meter

        if self._meter is None:
            self._meter = Meter(self.model)
        return self._meter.read()

    def recount(self) -> None:
        """Count all parameters again for the next state."""
        self._snapshots.forget()


class ModelRegistry:
    """Tracked models by name. A command that gets no model means the only one, and is refused where there are several.

    The current model is the one that was adapted, loaded into, trained or switched last. When it is unloaded
    or gone, no other takes its place, not even the only one left, until a command names one.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._models: dict[str, TrackedModel] = {}
        self._changed = changed
        self._current: str | None = None

    def all(self) -> tuple[TrackedModel, ...]:
        """The models that still exist."""
        for name, tracked in list(self._models.items()):
            if not tracked.alive:
                del self._models[name]
        return tuple(self._models.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(tracked.name for tracked in self.all())

    @property
    def current(self) -> TrackedModel | None:
        """The current model, if it still exists."""
        self.all()
        return None if self._current is None else self._models.get(self._current)

    def new(self, name: str | None, model: PeftModel) -> TrackedModel:
        """Prepare a model for ``select``, which alone adds it: what may fail can be done in between."""
        return TrackedModel(name or self._free_name(), model, self._changed)

    def add(self, name: str | None, model: PeftModel, *, select: bool = True) -> TrackedModel:
        """Track a model and make it the current one.

        A model that is known keeps its name; another model of that name is forgotten.

        Args:
            name: of its variable; None for a free one.
            model: an adapted model.
            select: make it the current one.
        """
        tracked = self.find(model) or self.new(name, model)
        self._models[tracked.name] = tracked
        if select:
            self._current = tracked.name
        return tracked

    def select(self, tracked: TrackedModel) -> None:
        """Make a model the current one, tracking it if it is new; cannot fail."""
        self._models[tracked.name] = tracked
        self._current = tracked.name

    def find(self, model: object) -> TrackedModel | None:
        """Find a model by itself, its base model or its manager; None if it is not tracked."""
        return next((tracked for tracked in self.all() if tracked.matches(model)), None)

    def get(self, model: object = None, *, command: str = "") -> TrackedModel:
        """Find a model by its name or itself, the only one for None.

        A model that is named while none is current becomes the current one.

        Args:
            model: a name, a model, or None.
            command: what it is for, for the message, e.g. ``merge``.

        Raises:
            AdapterError: there is no such model, or it has to be named; the message names the models.
        """
        current, names = self.current, self.names
        if model is None and len(names) > 1:
            message = f"several models carry adapters; {command or 'this'} needs one of them: {_choices(names)}"
            raise AdapterError(message, available=names)
        if model is None:
            found = current
        elif isinstance(model, str):
            found = self._models.get(model)
        else:
            found = self.find(uncompiled(model))
        if found is None:
            raise self._missing(model)
        if current is None:
            self._current = found.name
        return found

    def remove(self, tracked: TrackedModel) -> None:
        """Forget a model."""
        self._models.pop(tracked.name, None)
        if self._current == tracked.name:
            self._current = None

    def clear(self) -> None:
        """Forget all models."""
        self._models.clear()
        self._current = None

    def _missing(self, model: object) -> AdapterError:
        names = self.names
        there = ", ".join(names)
        if not names:
            what = f"{model!r:.60} carries no adapters" if isinstance(model, str) else "no model carries adapters"
            message = f"{what} yet; add one with session.add(model, config), or load one"
        elif model is None:
            message = f"the model used last is unloaded or gone; say which one is meant: {_choices(names)}"
        elif isinstance(model, str):
            message = f"no adapted model is called {model!r:.60}; there is: {there}.{did_you_mean(model, names)}"
        else:
            message = (
                "this model carries no adapters yet; add one with session.add(model, config), "
                f"or take a model that has some: {there}"
            )
        return AdapterError(message, **({"available": names} if names else {}))

    def _free_name(self) -> str:
        name, number = "model", 2
        while name in self._models:
            name, number = f"model{number}", number + 1
        return name


def _choices(names: Iterable[str]) -> str:
    """How each of some models is named in a command."""
    return " or ".join(f"model={name!r}" for name in names)
