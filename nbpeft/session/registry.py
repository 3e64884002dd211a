"""The models that a session knows, by the name of their notebook variable, referenced weakly."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from nbpeft.errors import AdapterError, did_you_mean
from nbpeft.session.configs import meaning
from nbpeft.session.handles import handle_over, is_handle, is_module, uncompiled
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
    from nbpeft.training.data import HeldOut


class TrackedModel:
    """An adapted model: weak references and what the session stores about it.

    Attributes:
        name: name of the notebook variable.
        memory: the last measurement.
        training: the state of the last run.
        training_call: the arguments of that run, if ``train`` started it.
        requested: adapter name -> its config, and the fields with which it was requested.
        written: adapter name -> names of the fields that the user wrote, also those with their default values.
        trained_steps: adapter name -> its config, the last step of the run that last trained it, and that run's id.
        earlier_steps: the same of the run before that, whose weights it continued from; 0 for new weights.
        unlearned: adapter name -> its config, and which rows of its training's data it has not learned, if known.
        scored: adapter name -> its config, the step and run that last trained it, and its last score, for its card.
        first_random: adapter name -> its config, and the random state of its initialization.
        sweep: adapters that a cell added for several values, until they are trained.
        origins: (adapter of a sweep, its config, the adapter from which it started); also of those that undo restores.
        combinations: adapter created by ``combine`` -> its config.
        result: result of its last training.
        variable: name of the notebook variable that last referred to it.
        before: whether its variable has another value now, and no other variable refers to it.
        adapters: names of its adapters.
        held: trained and unsaved adapter -> object that can copy it to host memory even without the model.
        fingerprint: fingerprint of the base model, as in the metadata of a file; empty if unknown.
    """

    def __init__(self, name: str, model: PeftModel, changed: Callable[[], None]) -> None:
        self.name = self.variable = name
        self.memory: MemoryState | None = None
        self.training: TrainState | None = None
        self.training_call: TrainingCall | None = None
        self.requested: dict[str, tuple[AdapterConfig, dict[str, Any]]] = {}
        self.written: dict[str, tuple[str, ...]] = {}
        self.trained_steps: dict[str, tuple[AdapterConfig, int, str]] = {}
        self.earlier_steps: dict[str, tuple[AdapterConfig, int, str]] = {}
        self.unlearned: dict[str, tuple[AdapterConfig, HeldOut | None]] = {}
        self.scored: dict[str, tuple[AdapterConfig, tuple[int, str], tuple[tuple[str, str], ...]]] = {}
        self.first_random: dict[str, tuple[AdapterConfig, Any]] = {}
        self.sweep: tuple[str, ...] = ()
        self.origins: list[tuple[str, AdapterConfig, str]] = []
        self.combinations: dict[str, weakref.ref[Any]] = {}
        self.result: TrainResult | None = None
        self.before = self._bound = self._in_variable = self._unloaded = False
        self.adapters: tuple[str, ...] = ()
        self.held: dict[str, Keeper] = {}
        self.fingerprint: Mapping[str, str] = {}
        self._model = weakref.ref(model)
        self._manager, self._owner = weakref.ref(model.manager), model.manager.owner
        self._snapshots = Snapshots()
        self._meter: Meter | None = None
        self._changed = changed
        model.manager.subscribe(self.on_change)

    def requested_fields(self, name: str) -> dict[str, Any]:
        """Returns the fields with which an adapter was requested, or else those of its config."""
        present = self.manager.configs[name]
        config, fields = self.requested.get(name, (None, {}))
        return fields if config is present else meaning(present)

    def steps_of(self, names: Iterable[str]) -> tuple[int, str]:
        """Returns the last step of the run that last trained adapters since they were added or loaded, and its id."""
        configs = [config for name in names if (config := self.manager.configs.get(name)) is not None]
        found = [item for item in self.trained_steps.values() if any(item[0] is config for config in configs)]
        return max(((steps, run) for _, steps, run in found), default=(0, ""))

    def origin_of(self, name: str) -> str:
        """Returns the adapter from which the sweep that made an adapter started; empty if no sweep made it."""
        present = self.manager.configs.get(name)
        return next((origin for made, config, origin in self.origins if made == name and config is present), "")

    def set_origin(self, names: Iterable[str], origin: str) -> None:
        """Records the adapter from which a sweep started."""
        configs = self.manager.configs
        self.origins += [(name, configs[name], origin) for name in names if name in configs]

    def with_clones(self, names: tuple[str, ...], members: Iterable[MemberState]) -> tuple[str, ...]:
        """Returns the adapters with which a training began and those cloned in it, which get the same origin."""
        clones = [member.name for member in members if member.name not in names]
        origin = next(filter(None, map(self.origin_of, names)), "")
        if origin:
            self.set_origin(clones, origin)
        return (*names, *clones)

    def count_steps(self, names: Iterable[str], run: Run) -> None:
        """Records the training steps of a run for adapters."""
        state = run.state
        # Some end before the others, and some with the weights of an earlier step.
        ends = {member.name: (member.step, member.restored_step) for member in state.members}
        done = {name: step if restored is None else restored for name, (step, restored) in ends.items()}
        for name in names:
            config = self.manager.configs.get(name)
            kept = state.restored_step if state.kept_step is None else state.kept_step
            here = done.get(name, state.step) if kept is None else kept
            if config is None:  # another thread has removed it meanwhile
                continue
            known = self.trained_steps.items()
            self.trained_steps = {other: item for other, item in known if item[0] is not config}  # renamed since
            last, before = (here, run.kept_id), run.earlier.get(name, (0, ""))
            if here:
                self.unlearned[name] = config, self._not_learned(name, config, run)
            self.trained_steps[name] = (config, *(last if here else before))
            if here:
                self.earlier_steps[name] = (config, *before)

    def _not_learned(self, name: str, config: AdapterConfig, run: Run) -> HeldOut | None:
        """Returns which rows an adapter has learned neither in a run nor in those that it continued from."""
        found = run.unlearned.get(name) or run.unlearned.get("")
        former, earlier = self.unlearned.get(name, (None, None))
        return found if found is None or former is not config or not run.earlier.get(name) else found.also(earlier)

    def score_of(self, name: str) -> tuple[tuple[str, str], ...]:
        """Returns the last score of an adapter as rows of text; empty if it was changed since, or not scored."""
        config, steps, rows = self.scored.get(name, (None, (0, ""), ()))
        return rows if config is self.manager.configs.get(name) and steps == self.steps_of((name,)) else ()

    def last_run(self, name: str) -> str:
        """Returns the id of the run that last trained an adapter; empty if there is none, or it was not saved."""
        return self.trained_steps.get(name, (None, 0, ""))[2]

    def remembered(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Returns the stored entries of some adapters, by attribute, to restore them on another model."""
        known: dict[str, dict[str, Any]] = {"requested": dict(self.requested), "first_random": dict(self.first_random)}
        known["trained_steps"] = dict(self.trained_steps)
        wanted = set(names)
        return {key: {name: item for name, item in entries.items() if name in wanted} for key, entries in known.items()}

    def bind(self) -> None:
        """Called while a variable with its name refers to the model: from now on unsaved adapters are preserved."""
        self._in_variable = True
        if not self._bound:
            self._bound = True
            self.fingerprint = self.fingerprint or _fingerprint(self.manager)
            self._hold()

    def stay(self) -> None:
        """Called when its variable was deleted; other references to the model may still exist."""
        self._in_variable = False

    def unbind(self) -> None:
        """Stops preserving unsaved adapters."""
        self._bound, self.held = False, {}

    def _hold(self) -> None:
        manager = self._manager()
        self._unloaded = manager is not None and not manager.alive
        names = manager.names if manager is not None and manager.alive else ()
        before, self.adapters, self.held = self.held, names, {}
        if manager is None or not self._bound:
            return
        from nbpeft.engine.runtime.snapshots import Keeper

        for name in [name for name in names if name in manager.unsaved]:
            keeper = before.get(name)
            if keeper is not None and keeper.fits(manager):
                keeper.update(manager)
            else:
                keeper = Keeper(manager, name)
            self.held[name] = keeper

    def on_change(self) -> None:
        """Report a change of the adapters; a method, because managers reference bound methods weakly."""
        self._hold()
        self._changed()

    @property
    def alive(self) -> bool:
        """Whether the model still exists and is still adapted."""
        model = self._handle()
        return model is not None and model.is_live

    @property
    def is_gone(self) -> bool:
        """Whether the model was deleted without being unloaded."""
        return self._handle() is None and not self._unloaded

    def _handle(self) -> PeftModel | None:
        """The model; if only its base model is left, a new PeftModel, which lives as long as that one does."""
        model = self._model()
        if model is None and (left := self._manager()) is not None and left.alive:
            del left
            gc.collect()  # layers refer to each other: a model without any other reference is deleted now
            manager = self._manager()
            if manager is not None and manager.owner is self._owner and (model := handle_over(manager.model)):
                self._model, self._owner, manager.kept = weakref.ref(model), manager.owner, model
        return model

    @property
    def was_bound(self) -> bool:
        """Whether a variable with its name referred to it at the last check."""
        return self._bound and self._in_variable

    @property
    def model(self) -> PeftModel:
        """The model.

        Raises:
            AdapterError: it no longer exists.
        """
        model = self._handle()
        if model is None:
            raise AdapterError(f"the model {self.name!r} is gone: no variable holds it any more")
        return model

    @property
    def manager(self) -> AdapterManager:
        """The manager of its adapters."""
        return self.model.manager

    def matches(self, thing: object) -> bool:
        """Returns whether an object is this model, its base model, its manager or another PeftModel of them."""
        manager = self._manager()
        return manager is not None and (
            thing is self._model()
            or thing is manager
            or thing is manager.model
            or getattr(thing, "manager", None) is manager
        )

    def is_inside(self, thing: object) -> bool:
        """Returns whether a module contains the model."""
        return is_module(thing) and any(self.matches(part) for part in thing.modules())  # type: ignore[attr-defined]

    def state(self) -> ModelState:
        """Returns the model's current state."""
        now, trained = self.manager.configs, list(self.trained_steps.items())  # another thread may add one
        replaced = tuple(name for name, (config, *_) in trained if now.get(name, config) is not config)
        snapshots = self._snapshots
        return snapshots.build(self.name, self.manager, memory=self.memory, training=self.training, replaced=replaced)

    def measure(self) -> MemoryState:
        """Measures the memory in use."""
        from nbpeft.memory import Meter

        if self._meter is None:
            self._meter = Meter(self.model)
        return self._meter.read()

    def recount(self) -> None:
        """Makes the next state count all parameters again."""
        self._snapshots.forget()


class Watcher(Protocol):
    """An observer of the variables of a notebook; see ``Variables``."""

    def look(self) -> None:
        """Examines the current values of the variables."""

    def on_removed(self, tracked: TrackedModel) -> None:
        """Called when a model was found to be deleted."""

    def note(self, words: str) -> None:
        """Adds a message to the notes of the next command."""

    def words_of_gone(self, name: str) -> str:
        """Describes the preserved adapters of a model that no longer exists; empty for any other name."""


class ModelRegistry:
    """Tracked models by name. A command without a model means the only one, and is refused if there are several.

    The current model is the one that was last adapted, loaded into, trained or switched. When it is unloaded or
    deleted, the only remaining one is used instead, except for merging and unloading. When its variable gets another
    model without adapters, there is no current model until a command names one.

    Attributes:
        watcher: observer of a notebook's variables; None if there is no notebook.
        rebound: variable of the former current model, after it got another value; empty once there is a new one.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._models: dict[str, TrackedModel] = {}
        self._changed = changed
        self.watcher: Watcher | None = None
        self._current: str | None = None
        self._handles: list[PeftModel] = []
        self.rebound = ""

    def known(self) -> tuple[TrackedModel, ...]:
        """Returns the models, including deleted ones that were not noticed yet, but without unloaded ones."""
        return tuple(tracked for tracked in list(self._models.values()) if tracked.alive or tracked.is_gone)

    def all(self) -> tuple[TrackedModel, ...]:
        """Returns the models that still exist."""
        for tracked in list(self._models.values()):
            if not tracked.alive:
                self.remove(tracked)
                if tracked.is_gone and self.watcher is not None:
                    self.watcher.on_removed(tracked)
        return tuple(self._models.values())

    def deciding(self) -> ExitStack:
        """Context manager for a command: ``AdapterManager.deciding`` of all models."""
        with ExitStack() as block:
            for tracked in self.all():
                manager = tracked._manager()
                if manager is not None:
                    block.enter_context(manager.deciding())
            return block.pop_all()

    def release_current(self, name: str) -> None:
        """Called when the variable of a model gets another value: if the model was current, there is none now."""
        if name == self._current:
            self._current, self.rebound = None, name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(tracked.name for tracked in self.all())

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the models that a command without a name can refer to: those whose variable refers to them."""
        return tuple(tracked.name for tracked in self.all() if not tracked.before)

    @property
    def current(self) -> TrackedModel | None:
        """The current model, if it still exists."""
        self.all()
        return None if self._current is None else self._models.get(self._current)

    def new(self, name: str | None, model: PeftModel) -> TrackedModel:
        """Create a model for ``select``, which adds it, so that steps that can fail come between."""
        return TrackedModel(name or self.free_name("model"), model, self._changed)

    def add(self, name: str | None, model: PeftModel, *, select: bool = True) -> TrackedModel:
        """Track a model and make it the current one.

        A known model keeps its name; another model with the same name is removed.
        """
        tracked = self.find(model) or self.new(name, model)
        self._models[tracked.name] = tracked
        if select:
            self.select(tracked)
        return tracked

    def select(self, tracked: TrackedModel) -> None:
        """Make a model the current one, unless its variable has another value; tracks new models; cannot fail.

        Another model with its name is removed, or renamed if it has unsaved adapters.
        """
        other = self._models.get(tracked.name)
        if other is not None and other is not tracked and other.held:
            self.rename({other: self.free_name(f"{other.variable} (before)")}, {other})
        self._models[tracked.name] = tracked
        if not tracked.before:
            self._current, self.rebound = tracked.name, ""

    def rename(self, names: Mapping[TrackedModel, str], before: Collection[TrackedModel]) -> None:
        """Renames models, all at once.

        Args:
            names: model -> its new name.
            before: models that no variable refers to any more; the names of the others are their variables.
        """
        for tracked, name in names.items():
            tracked.name, tracked.before = name, tracked in before
            if not tracked.before:
                tracked.variable = name
        self._models = {tracked.name: tracked for tracked in list(self._models.values())}

    def find(self, model: object) -> TrackedModel | None:
        """Return a tracked model by the model, its base model or its manager; None if it is not tracked."""
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

    def get(self, model: object = None, *, command: str = "", adapters: Iterable[object] = ()) -> TrackedModel:
        """Return a model by its name or the model itself; None for the only one, or the only one with some adapters.

        A model that is named while there is no current one becomes the current one.

        Args:
            model: a name, a model, or None.
            command: name of the command, for the message, e.g. ``merge``.
            adapters: names of existing adapters that the command was given; None among them is no name.

        Raises:
            AdapterError: there is no such model, or a name is required; the message has the names.
            UnknownAdapterError: there are several models, and one of the adapters is on none of them.
        """
        if self.watcher is not None:
            self.watcher.look()
        current, choices = self.current, self.choices
        if model is None and len(choices) > 1:
            choices = self._with_adapters(choices, [name for name in adapters if isinstance(name, str)]) or choices
            model = choices[0] if len(choices) == 1 else None
        if model is None and len(choices) > 1:
            message = f"several models carry adapters; {command or 'this'} needs one of them: {_choices(choices)}"
            raise AdapterError(message, available=choices)
        if model is None:
            tracked = current if current is not None else self._only_left(command)
        elif isinstance(model, str):
            tracked = self._models.get(model)
        else:
            tracked = self.find(uncompiled(model)) or self.adopt(uncompiled(model))
        if tracked is None:
            raise self._missing(model)
        if current is None:
            self.select(tracked)
        return tracked

    def have(self, adapter: str) -> bool:
        """Whether one of the models has an adapter of this name, or can load it."""
        return any(self._models[name].manager.available(adapter) for name in self.choices)

    def _with_adapters(self, choices: Iterable[str], adapters: Collection[str]) -> tuple[str, ...]:
        """Returns the names of those models that have all of some adapters; empty if no adapter is named.

        Raises:
            UnknownAdapterError: one of the adapters is on none of the models.
        """
        managers = {name: self._models[name].manager for name in choices}
        for adapter in adapters:
            if not self.have(adapter):
                from nbpeft.engine.config.adapter_names import unknown_adapter

                present = dict.fromkeys(name for manager in managers.values() for name in manager.names)
                raise unknown_adapter(adapter, present, "the models have")
        having = (name for name, manager in managers.items() if all(map(manager.available, adapters)))
        return tuple(having) if adapters else ()

    def _only_left(self, command: str) -> TrackedModel | None:
        """Returns the only model that a command without a name can mean, after the current one is lost."""
        if self.rebound or command in _ON_THE_BASE or len(self.choices) != 1:
            return None
        (name,) = self.choices
        if self._current is not None and self.watcher is not None:
            self.watcher.note(f"this is {name!r}, the only model with adapters: {self._current!r} has none any more")
        return self._models[name]

    def remove(self, tracked: TrackedModel) -> None:
        """Remove a model; the name of the current model does not change."""
        self._models.pop(tracked.name, None)

    def clear(self) -> None:
        """Remove all models."""
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
        """Returns a name that no model has: ``model``, ``model2``; ``model (before)``, ``model (before 2)``."""
        stem, bracket = wanted.removesuffix(")"), ")" if wanted.endswith(")") else ""
        used, name, number = {*self._models, *taken}, wanted, 2
        while name in used:
            name, number = f"{stem}{' ' if bracket else ''}{number}{bracket}", number + 1
        return name


_ON_THE_BASE = ("merge", "unload")
"""Commands that change the base weights or all adapters, which are never applied to a model as a substitute."""


def _fingerprint(manager: AdapterManager) -> Mapping[str, str]:
    """Returns the fingerprint of a base model as metadata; empty if it cannot be computed now."""
    if manager.merged:
        return {}
    from nbpeft.checkpoint import fingerprint
    from nbpeft.model.saving.sharded import is_sharded

    return {} if is_sharded(manager.model) else fingerprint(manager.model).to_metadata()


def _choices(names: Iterable[str]) -> str:
    """Returns the arguments that select models, as text."""
    return " or ".join(f"model={name!r}" for name in names)
