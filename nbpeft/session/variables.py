"""The variables of a notebook: which variable refers to which model, and what happens when a variable changes.

Models are referenced weakly. Trained and unsaved adapters are preserved anyway: while a variable with a model's name
refers to the model, the modules of such adapters are referenced separately. When the model is deleted, they move to
host memory, without the base model, until ``undo`` restores them or ``discard`` is called.

    model = load() again ──> model exists, in m2           named "m2" from now on
                             model exists, no variable     named "model (before)"
                             model deleted, unsaved        its adapters are preserved as "model (before)"
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbpeft.session.handles import is_handle, is_module, uncompiled
from nbpeft.session.history import History, PastModel, base_difference

if TYPE_CHECKING:
    from nbpeft.session.registry import ModelRegistry, TrackedModel


_COLLECTIONS = 3
"""Number of garbage collections, because memory held by torch's own objects is only freed in a later one."""


class Variables:
    """Watches the variables of a notebook, and reports once when one refers to another model."""

    def __init__(
        self,
        models: ModelRegistry,
        history: History,
        publish: Callable[[], None],
        is_busy: Callable[[], bool],
        run_name: Callable[[str], str],
    ) -> None:
        self._models, self._history, self._publish = models, history, publish
        self._is_busy, self._run_name = is_busy, run_name
        self._mapping: Mapping[str, object] | None = None
        self._notices: list[str] = []
        self._looking = threading.Lock()

    def watch(self, mapping: Mapping[str, object]) -> None:
        """Examines these variables now, and before each command from now on."""
        self._mapping = mapping
        self.look()

    def module(self, name: str) -> Any:
        """Returns the model in a variable, adapted or not; None for anything else."""
        value = None if self._mapping is None else self._mapping.get(name)
        return uncompiled(value) if is_module(value) else None

    def note(self, words: str) -> None:
        """Adds a message to the notes of the next command."""
        if words not in self._notices:
            self._notices.append(words)

    def take_notices(self) -> tuple[str, ...]:
        """Returns the messages and clears them."""
        taken, self._notices = tuple(self._notices), []
        return taken

    def clear(self) -> None:
        """Stops watching the variables."""
        self._mapping = None
        self._notices.clear()

    def look(self) -> None:
        """Examines the current values of the variables. This is fast and imports nothing.

        Without ``nbpeft.model`` no model is adapted. Inside a command this does nothing, so that its model is fixed.
        """
        if self._mapping is None or self._is_busy() or "nbpeft.model" not in sys.modules:
            return
        # Does not wait: the thread that looks already publishes what it finds.
        if not self._looking.acquire(blocking=False):
            return
        try:
            variables = {name: value for name, value in list(self._mapping.items()) if not name.startswith("_")}
            moved = self._find_known(variables)
            if self._adopt(variables) or moved:
                self._publish()
        finally:
            self._looking.release()

    def _find_known(self, variables: Mapping[str, object]) -> bool:
        """Updates the names of known models from the variables; returns whether any changed."""
        moved: dict[TrackedModel, str] = {}
        named: dict[TrackedModel, str] = {}
        deleted: list[TrackedModel] = []
        for tracked in self._models.known():
            holders = _holders(tracked, variables)
            if tracked.alive and (tracked.name in holders or tracked.is_inside(variables.get(tracked.name))):
                tracked.bind()
            elif holders and not tracked.was_bound and not tracked.before:  # added without a name or with another one
                named[tracked] = holders[-1]
            elif tracked.name in variables or (tracked.before and holders):
                moved[tracked] = holders[-1] if holders else ""
            elif tracked.was_bound and not holders and not tracked.before:  # the variable was deleted
                deleted.append(tracked)
        _collect([*deleted, *(tracked for tracked, alias in moved.items() if not alias)])
        for tracked in deleted:
            tracked.stay()
        if moved or named:
            self._move(moved, named)
        return bool(moved or named or deleted)

    def _move(self, moved: Mapping[TrackedModel, str], named: Mapping[TrackedModel, str]) -> None:
        """Renames models whose variable has another value, with a message, and names models found in a variable."""
        registry = self._models
        names: dict[TrackedModel, str] = dict(named)
        for tracked, alias in moved.items():
            if not tracked.alive:
                registry.remove(tracked)
                self.on_removed(tracked)
                continue
            registry.release_current(tracked.name)
            names[tracked] = alias or self._free(f"{tracked.variable} (before)", names.values())
            if not tracked.before:
                self.note(self._moved_words(tracked, names[tracked], offers_undo=not alias))
        registry.rename(names, {tracked for tracked, alias in moved.items() if not alias})

    def _moved_words(self, tracked: TrackedModel, name: str, *, offers_undo: bool) -> str:
        adapters = ", ".join(map(repr, tracked.manager.names)) or "no adapters"
        unsaved = ", ".join(map(repr, tracked.held)) if offers_undo else ""
        back = ""
        if unsaved:
            fits = self._takes(tracked.variable, tracked.fingerprint)
            back = f"; session.undo() copies {unsaved}, trained and not saved, to {tracked.variable!r}"
            back = back if fits else f"; {unsaved} on it {'is' if len(tracked.held) == 1 else 'are'} not saved"
        return f"{self._holds(tracked)}; the model with {adapters} is {name!r}{back}"

    def _holds(self, tracked: TrackedModel) -> str:
        value = None if self._mapping is None else self._mapping.get(tracked.variable)
        return f"{tracked.variable!r} holds {'another model' if is_module(value) else 'something else'} now"

    def _adopt(self, variables: Mapping[str, object]) -> bool:
        """Tracks adapted models that are not tracked yet; returns whether there were any."""
        models = self._models
        known = models.all()
        new = []
        for name, value in variables.items():
            if is_handle(value):
                handle: Any = value
                if handle.is_live and models.find(handle) is None:
                    new.append(models.add(name, handle, select=name == models.rebound))
        for tracked in new:
            tracked.bind()
        if len(new) == 1 and not known:
            models.select(new[0])
        return bool(new)

    # Deleted models

    def on_removed(self, tracked: TrackedModel) -> None:
        """Called when a model was found to be deleted: preserves its trained and unsaved adapters."""
        variables = {} if self._mapping is None else self._mapping
        if _holders(tracked, variables):  # its base model still exists and has the adapters
            return
        rebound = tracked.variable in variables and not tracked.before
        if rebound:
            self._models.release_current(tracked.name)
        if rebound and tracked.was_bound and not tracked.held:
            adapters = f", with {', '.join(map(repr, tracked.adapters))}," if tracked.adapters else ""
            self.note(f"{self._holds(tracked)}; the model before{adapters} is gone")
        if tracked.held:
            self._keep(tracked, self._holds(tracked) if rebound else f"the model {tracked.name!r} is gone")
            tracked.unbind()

    def unsaved_of(self, tracked: TrackedModel) -> PastModel:
        """Returns copies of a model's trained and unsaved adapters, in host memory."""
        adapters, remembered = [], tracked.remembered(tracked.held)
        for keep in tracked.held.values():
            kept = keep()
            config = kept.config.copy()
            for known in remembered.values():
                if kept.name in known:
                    known[kept.name] = (config, *known[kept.name][1:])
            adapters.append(replace(kept, config=config))
        return PastModel(
            name=self._free(tracked.name if tracked.before else f"{tracked.variable} (before)"),
            variable=tracked.variable,
            adapters=tuple(adapters),
            fingerprint=tracked.fingerprint,
            runs={name: run for name in tracked.held if (run := self._run_name(tracked.last_run(name)))},
            remembered=remembered,
        )

    def _keep(self, tracked: TrackedModel, what: str) -> None:
        """Preserves the trained and unsaved adapters of a model, with a message."""
        past = self.unsaved_of(tracked)
        dropped = self._history.add_model(past)
        were, them = ("was", "it") if len(past.adapters) == 1 else ("were", "them")
        when = self._condition_of(past)
        self.note(f"{what}; {past.words} on it {were} trained and not saved: session.undo() restores {them}{when}")
        for older in dropped:
            self.note(older.dropped_words)

    def _free(self, name: str, taken: Iterable[str] = ()) -> str:
        return self._models.free_name(name, (*taken, *self._history.model_names))

    def words_of_gone(self, name: str) -> str:
        """Describes the preserved adapters of a deleted model; empty for any other name."""
        past = self._history.model(name)
        if past is None:
            return ""
        when = self._condition_of(past)
        return f"{name!r} is gone; session.undo() restores {past.words} of it{when}"

    def _condition_of(self, past: PastModel) -> str:
        """When the adapters of a former model can be restored, as part of a sentence; empty for now."""
        fits = self._takes(past.variable, past.fingerprint)
        return "" if fits else f" once {past.variable!r} holds its base model again"

    def _takes(self, variable: str, fingerprint: Mapping[str, str]) -> bool:
        """Returns whether adapters fit the model in a variable, as far as its weights can tell."""
        from nbpeft.engine.tree.model_tree import manager_of

        model = self.module(variable)
        manager = None if model is None else manager_of(model)
        if model is None or (manager is not None and manager.merged):
            return True
        return base_difference(fingerprint, model if manager is None else manager.model) is None


def _holders(tracked: TrackedModel, variables: Mapping[str, object]) -> list[str]:
    """Returns the variables that refer to a model, its PeftModel or its base."""
    own = {name: value for name, value in list(variables.items()) if not name.startswith("_") and is_module(value)}
    return [name for name, value in own.items() if tracked.matches(uncompiled(value))]


def _collect(models: Collection[TrackedModel]) -> None:
    """Collects garbage, so that models without references are deleted now instead of at an arbitrary time."""
    for _ in range(_COLLECTIONS if models else 0):
        gc.collect()
        if all(tracked.is_gone for tracked in models):
            return
