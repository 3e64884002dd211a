"""The models a session knows, by the name of their notebook variable, held weakly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, did_you_mean
from nbpeft.session.handles import is_live, uncompiled
from nbpeft.session.snapshot import Snapshots
from nbpeft.state import MemoryState, ModelState, TrainState

if TYPE_CHECKING:
    from nbpeft.engine.adapter import AdapterConfig
    from nbpeft.engine.manager import AdapterManager
    from nbpeft.model import PeftModel


class Entry:
    """One adapted model: weak references and what the session remembers of it."""

    def __init__(self, name: str, model: PeftModel, changed: Callable[[], None]) -> None:
        self.name = name
        self.memory: MemoryState | None = None
        self.training: TrainState | None = None
        self.plain = False
        """Whether the text it was last trained on had no chat template around it."""
        self.asked: dict[str, tuple[AdapterConfig, dict[str, Any]]] = {}
        """Adapter name -> the config in the model and what was asked for when it was made."""
        self._model = weakref.ref(model)
        self._manager = weakref.ref(model.manager)
        self._snapshots = Snapshots()
        self._changed = changed
        model.manager.subscribe(self.on_change)

    def on_change(self) -> None:
        """The manager says that something changed."""
        self._changed()

    @property
    def alive(self) -> bool:
        """Whether the model is still there and still adapted."""
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

    def holds(self, thing: object) -> bool:
        """Whether this is the entry of a model, of its base, or of its manager."""
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

    def recount(self) -> None:
        """Counts everything anew for the next state."""
        self._snapshots.forget()


class ModelBook:
    """Entries by name, and which one commands without a model mean.

    That is the model that was adapted, loaded into, trained or switched last. When it is unloaded or gone, no
    other takes its place until a command names one.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._entries: dict[str, Entry] = {}
        self._changed = changed
        self._current: str | None = None

    def entries(self) -> tuple[Entry, ...]:
        """The models that are still there."""
        for name, entry in list(self._entries.items()):
            if not entry.alive:
                del self._entries[name]
        return tuple(self._entries.values())

    @property
    def current(self) -> Entry | None:
        """The model that commands without one mean."""
        self.entries()
        return None if self._current is None else self._entries.get(self._current)

    def enter(self, name: str | None, model: PeftModel) -> Entry:
        """Takes a model up under a name and makes it the current one.

        A model that is known keeps its name; another model of that name is forgotten.
        """
        entry = self.take_up(name, model)
        self._current = entry.name
        return entry

    def take_up(self, name: str | None, model: PeftModel) -> Entry:
        """As ``enter``, but leaves the current one as it is."""
        entry = self.find(model) or self.prepare(name, model)
        self._entries[entry.name] = entry
        return entry

    def prepare(self, name: str | None, model: PeftModel) -> Entry:
        """An entry that is not in the book yet, for what has to be done before ``add``."""
        return Entry(name or self._free_name(), model, self._changed)

    def add(self, entry: Entry) -> None:
        """Takes a prepared entry up and makes it the current one; cannot fail."""
        self._entries[entry.name] = entry
        self._current = entry.name

    def find(self, model: object) -> Entry | None:
        """The entry of a model or of its base, or None."""
        return next((entry for entry in self.entries() if entry.holds(model)), None)

    def get(self, model: object = None) -> Entry:
        """The entry of a name, a model, or the current one for None.

        A model that is named while none is current becomes the current one.

        Raises:
            AdapterError: there is none; the message names the models there are.
        """
        found: Entry | None
        current = self.current
        if model is None:
            found = current
        elif isinstance(model, str):
            found = self._entries.get(model)
        else:
            found = self.find(uncompiled(model))
        if found is None:
            raise self._missing(model)
        if current is None:
            self._current = found.name
        return found

    def get_for(self, what: str, model: object = None) -> Entry:
        """As ``get``, for a command that takes something away: None is refused where there are several models.

        Args:
            what: the command does, e.g. ``merge``.
            model: a name, a model, or None.

        Raises:
            AdapterError: there is none, or it has to be said which.
        """
        names = tuple(entry.name for entry in self.entries())
        if model is None and len(names) > 1:
            message = f"several models carry adapters: {', '.join(names)}; say which one to {what} (model, --model)"
            raise AdapterError(message, available=names)
        return self.get(model)

    def _missing(self, model: object) -> AdapterError:
        names = tuple(entry.name for entry in self.entries())
        if not names:
            what = f"{model!r:.60} carries no adapters" if isinstance(model, str) else "no model carries adapters"
            return AdapterError(f"{what} yet; add one with a cell that begins with %%lora MODEL, or load one")
        there = ", ".join(names)
        if model is None:
            message = f"the model used last is unloaded or gone; say which one is meant (model, --model): {there}"
        elif isinstance(model, str):
            message = f"no adapted model is called {model!r:.60}; there is: {there}.{did_you_mean(model, names)}"
        else:
            message = (
                "this model carries no adapters yet; add one with a cell that begins with %%lora MODEL, "
                f"or take one that has some: {there}"
            )
        return AdapterError(message, available=names)

    def leave(self, entry: Entry) -> None:
        """Forgets a model."""
        self._entries.pop(entry.name, None)
        if self._current == entry.name:
            self._current = None

    def clear(self) -> None:
        """Forgets all models."""
        self._entries.clear()
        self._current = None

    def _free_name(self) -> str:
        names, number = set(self._entries), 2
        if "model" not in names:
            return "model"
        while f"model{number}" in names:
            number += 1
        return f"model{number}"
