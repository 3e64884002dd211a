"""The models that a session knows, by the name of their notebook variable, held weakly."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from nbpeft.errors import AdapterError, did_you_mean
from nbpeft.session.configs import meaning
from nbpeft.session.handles import handle_over, is_handle, is_live, is_module, uncompiled
from nbpeft.session.snapshot import Snapshots
from nbpeft.state import MemberState, MemoryState, ModelState, TrainState

if TYPE_CHECKING:
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.engine.runtime.snapshots import Keeper
    from nbpeft.memory import Meter
    from nbpeft.model import PeftModel
    from nbpeft.session.trained import TrainingCall
    from nbpeft.training import Run, TrainResult


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
        combinations: adapter that ``combine`` made -> its config.
        result: what came of its last training.
        variable: name of the notebook variable that was seen to hold it last.
        before: whether its variable holds something else now, and no other one holds it.
        adapters: their names.
        held: adapter that was trained and is not saved -> what copies it to host memory, also without the model.
        fingerprint: of the base model, as in the metadata of a file; empty where it is not known.
    """

    def __init__(self, name: str, model: PeftModel, changed: Callable[[], None]) -> None:
        self.name = self.variable = name
        self.memory: MemoryState | None = None
        self.training: TrainState | None = None
        self.training_call: TrainingCall | None = None
        self.trained_on_plain_text = False
        self.requested: dict[str, tuple[AdapterConfig, dict[str, Any]]] = {}
        self.trained_steps: dict[str, tuple[AdapterConfig, int, str]] = {}
        self.first_random: dict[str, tuple[AdapterConfig, Any]] = {}
        self.sweep: tuple[str, ...] = ()
        self.origins: dict[str, str] = {}
        self.combinations: dict[str, weakref.ref[Any]] = {}
        self.result: TrainResult | None = None
        self.before = self._bound = self._in_variable = self._unloaded = False
        self.adapters: tuple[str, ...] = ()
        self.held: dict[str, Keeper] = {}
        self.fingerprint: Mapping[str, str] = {}
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
        configs = [config for name in names if (config := self.manager.configs.get(name)) is not None]
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
            config, state = self.manager.configs.get(name), run.state
            steps = run.steps_before + (state.step if state.kept_step is None else state.kept_step)
            if config is not None:  # another thread may have taken it out meanwhile
                self.trained_steps[name] = (config, steps, os.path.basename(run.folder))

    def last_run(self, name: str) -> str:
        """The run that trained an adapter last; empty where none did."""
        return self.trained_steps.get(name, (None, 0, ""))[2]

    def remembered(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is known of some adapters, by attribute, to go along with them to another model."""
        known: dict[str, dict[str, Any]] = {"requested": dict(self.requested), "first_random": dict(self.first_random)}
        known["trained_steps"] = dict(self.trained_steps)
        wanted = set(names)
        return {key: {name: item for name, item in found.items() if name in wanted} for key, found in known.items()}

    def bind(self) -> None:
        """Called while a variable of its name holds the model: what would be lost with it is held from now on."""
        self._in_variable = True
        if not self._bound:
            self._bound = True
            self.fingerprint = self.fingerprint or _fingerprint(self.manager)
            self._hold()

    def stay(self) -> None:
        """Called when its variable was deleted: what else holds it may go on doing so."""
        self._in_variable = False

    def unbind(self) -> None:
        """Holds nothing any more."""
        self._bound, self.held = False, {}

    def _hold(self) -> None:
        manager = self._manager()
        self._unloaded = manager is not None and not manager.alive
        names = manager.names if manager is not None and manager.alive else ()
        before, self.adapters, self.held = self.held, names, {}
        if manager is None or not self._bound:
            return
        for name in [name for name in names if name in manager.unsaved]:
            keeper = before.get(name)
            if keeper is not None and keeper.fits(manager):
                keeper.update(manager)
            else:
                keeper = _keeper(manager, name)
            self.held[name] = keeper

    def on_change(self) -> None:
        """Report a change of the adapters; a method, because managers hold those weakly."""
        self._hold()
        self._changed()

    @property
    def alive(self) -> bool:
        """Whether the model still exists and is still adapted."""
        model = self._model()
        return model is not None and is_live(model)

    @property
    def is_gone(self) -> bool:
        """Whether the model does not exist any more, though nobody unloaded it."""
        return self._model() is None and not self._unloaded

    @property
    def was_bound(self) -> bool:
        """Whether a variable of its name held it when that was looked at last."""
        return self._bound and self._in_variable

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

    def is_inside(self, thing: object) -> bool:
        """Whether a module is a wrapper around the model."""
        return is_module(thing) and any(self.matches(part) for part in thing.modules())  # type: ignore[attr-defined]

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


class Watcher(Protocol):
    """Who watches the variables of a notebook; see ``Variables``."""

    def look(self) -> None:
        """Finds out what the variables hold now."""

    def on_removed(self, tracked: TrackedModel) -> None:
        """Called when a model turns out to be gone."""

    def note(self, words: str) -> None:
        """Has the next command say something."""

    def words_of_gone(self, name: str) -> str:
        """What is left of a model that is gone; empty for any other name."""


class ModelRegistry:
    """Tracked models by name. A command that gets no model means the only one, and is refused where there are several.

    The current model is the one that was adapted, loaded into, trained or switched last. When it is unloaded
    or gone, the only one left takes its place, but not to merge or unload that. When its variable holds another model
    that has no adapters, none takes its place until a command names one.

    Args:
        changed: called when a model changed.

    Attributes:
        watcher: of the variables of a notebook; None before there is one.
        rebound: variable of the model that was current until that variable held another; empty once another is.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._models: dict[str, TrackedModel] = {}
        self._changed = changed
        self.watcher: Watcher | None = None
        self._current: str | None = None
        self._handles: list[PeftModel] = []
        self.rebound = ""

    def known(self) -> tuple[TrackedModel, ...]:
        """The models, also those that nobody has noticed to be gone yet; without those that were unloaded."""
        return tuple(tracked for tracked in self._models.values() if tracked.alive or tracked.is_gone)

    def all(self) -> tuple[TrackedModel, ...]:
        """The models that still exist."""
        for tracked in list(self._models.values()):
            if not tracked.alive:
                self.remove(tracked)
                if tracked.is_gone and self.watcher is not None:
                    self.watcher.on_removed(tracked)
        return tuple(self._models.values())

    def deciding(self) -> ExitStack:
        """Context manager around a command: see ``AdapterManager.deciding``, here of all models."""
        with ExitStack() as block:
            for tracked in self.all():
                manager = tracked._manager()
                if manager is not None:
                    block.enter_context(manager.deciding())
            return block.pop_all()

    def release_current(self, name: str) -> None:
        """Called when the variable of a model holds something else: if it was current, none is now."""
        if name == self._current:
            self._current, self.rebound = None, name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(tracked.name for tracked in self.all())

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the models that a command without one may mean: those whose variable holds them."""
        return tuple(tracked.name for tracked in self.all() if not tracked.before)

    @property
    def current(self) -> TrackedModel | None:
        """The current model, if it still exists."""
        self.all()
        return None if self._current is None else self._models.get(self._current)

    def new(self, name: str | None, model: PeftModel) -> TrackedModel:
        """Prepare a model for ``select``, which alone adds it: what may fail can be done in between."""
        return TrackedModel(name or self.free_name("model"), model, self._changed)

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
            self.select(tracked)
        return tracked

    def select(self, tracked: TrackedModel) -> None:
        """Make a model the current one, unless its variable holds another, tracking it if it is new; cannot fail.

        Another one of that name is forgotten, but one that holds training that is not saved gets another name.
        """
        other = self._models.get(tracked.name)
        if other is not None and other is not tracked and other.held:
            self.rename({other: self.free_name(f"{other.variable} (before)")}, {other})
        self._models[tracked.name] = tracked
        if not tracked.before:
            self._current, self.rebound = tracked.name, ""

    def rename(self, names: Mapping[TrackedModel, str], before: Collection[TrackedModel]) -> None:
        """Gives models other names, all at once.

        Args:
            names: model -> its new name.
            before: those that no variable holds any more; the others are called by their variables.
        """
        for tracked, name in names.items():
            tracked.name, tracked.before = name, tracked in before
            if not tracked.before:
                tracked.variable = name
        self._models = {tracked.name: tracked for tracked in self._models.values()}

    def find(self, model: object) -> TrackedModel | None:
        """Find a model by itself, its base model or its manager; None if it is not tracked."""
        return next((tracked for tracked in self.all() if tracked.matches(model)), None)

    def adopt(self, model: Any, name: str | None = None) -> TrackedModel | None:
        """Track a model that carries adapters and is not known; None for a bare one.

        Where a variable holds only its base model, the command that runs keeps a handle on it alive.

        Args:
            model: an adapted model, or the base model of one.
            name: of its variable; None for a free one.

        Raises:
            AdapterError: its adapters are no longer on the base model.
        """
        handle = model if is_handle(model) else handle_over(model) if is_module(model) else None
        if handle is None:
            return None
        handle._check_live()
        if handle is not model:
            self._handles.append(handle)
        return self.add(name, handle)

    def release_handles(self) -> None:
        """Called when the outermost command has ended."""
        self._handles.clear()

    def get(self, model: object = None, *, command: str = "") -> TrackedModel:
        """Find a model by its name or itself, the only one for None.

        A model that is named while none is current becomes the current one.

        Args:
            model: a name, a model, or None.
            command: what it is for, for the message, e.g. ``merge``.

        Raises:
            AdapterError: there is no such model, or it has to be named; the message names the models.
        """
        if self.watcher is not None:
            self.watcher.look()
        current, choices = self.current, self.choices
        if model is None and len(choices) > 1:
            message = f"several models carry adapters; {command or 'this'} needs one of them: {_choices(choices)}"
            raise AdapterError(message, available=choices)
        if model is None:
            found = current if current is not None else self._only_left(command)
        elif isinstance(model, str):
            found = self._models.get(model)
        else:
            found = self.find(uncompiled(model)) or self.adopt(uncompiled(model))
        if found is None:
            raise self._missing(model)
        if current is None:
            self.select(found)
        return found

    def _only_left(self, command: str) -> TrackedModel | None:
        """The only model that a command without one can mean, after the current one was unloaded or is gone."""
        if self.rebound or command in _ON_THE_BASE or len(self.choices) != 1:
            return None
        (name,) = self.choices
        if self._current is not None and self.watcher is not None:
            self.watcher.note(f"this is {name!r}, the only model with adapters: {self._current!r} has none any more")
        return self._models[name]

    def remove(self, tracked: TrackedModel) -> None:
        """Forget a model; that it was the current one stays known by its name."""
        self._models.pop(tracked.name, None)

    def clear(self) -> None:
        """Forget all models."""
        self._models.clear()
        self._current, self.rebound = None, ""

    def _missing(self, model: object) -> AdapterError:
        names = self.names
        there = ", ".join(names)
        if isinstance(model, str) and self.watcher is not None and (words := self.watcher.words_of_gone(model)):
            message = words
        elif model is None and self.rebound:
            message = f"{self.rebound!r} holds another object now, which has no adapters"
            message += f"; say which one is meant: {_choices(names)}" if names else ""
        elif not names:
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

    def free_name(self, wanted: str, taken: Iterable[str] = ()) -> str:
        """A name that no model has: ``model``, ``model2``; ``model (before)``, ``model (before 2)``."""
        stem, bracket = wanted.removesuffix(")"), ")" if wanted.endswith(")") else ""
        used, name, number = {*self._models, *taken}, wanted, 2
        while name in used:
            name, number = f"{stem}{' ' if bracket else ''}{number}{bracket}", number + 1
        return name


_ON_THE_BASE = ("merge", "unload")
"""Commands on base weights and on all adapters at once, which take no model for another that is gone."""


def _keeper(manager: AdapterManager, name: str) -> Keeper:
    from nbpeft.engine.runtime.snapshots import Keeper

    return Keeper(manager, name)


def _fingerprint(manager: AdapterManager) -> Mapping[str, str]:
    """What a base model is known by; empty where that cannot be told now."""
    if manager.merged:
        return {}
    from nbpeft.checkpoint import fingerprint
    from nbpeft.model.saving.sharded import is_sharded

    return {} if is_sharded(manager.model) else fingerprint(manager.model).to_metadata()


def _choices(names: Iterable[str]) -> str:
    """How each of some models is named in a command."""
    return " or ".join(f"model={name!r}" for name in names)
