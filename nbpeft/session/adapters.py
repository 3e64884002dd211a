"""The commands that bring adapters in and out of a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, AdapterExistsError, UnknownAdapterError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.session.base import SessionBase
from nbpeft.session.book import Entry
from nbpeft.session.checks import adapter_name, place_of
from nbpeft.session.configs import build_config, meaning
from nbpeft.session.files import adapter_name_of, folder_hint, save_adapters
from nbpeft.session.handles import reviver, uncompiled
from nbpeft.session.planning import foreseen
from nbpeft.session.preview import preview_of
from nbpeft.session.results import AddResult, CommandResult, LoadResult, ModelRef, Preview, SaveResult
from nbpeft.state import AdapterState, ModelState

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.adapter import AdapterConfig
    from nbpeft.model import PeftModel

    ConfigLike = AdapterConfig | Mapping[str, Any]
    ModelLike = nn.Module | str | None


class AdapterCommands(SessionBase):
    """Adding, loading, saving, deleting, renaming and copying."""

    def add(
        self,
        model: ModelLike,
        config: ConfigLike,
        *,
        name: str = "default",
        variable: str | None = None,
        allow_missing: bool = False,
        trainable: bool = True,
    ) -> AddResult:
        """Configures and applies an adapter; an adapter of that name is reconfigured.

        Args:
            model: a bare or an adapted model.
            config: a config, or its fields.
            name: the adapter.
            variable: what to call a model that is new here.
            allow_missing: go on where a target matches nothing, as long as others match.
            trainable: whether it trains while it is active.

        Raises:
            ConfigError: a field is unknown or impossible.
            TargetError: the targets do not match the model.
        """
        made = build_config(config)
        adapter_name(name)
        with self._command(f"adding {name!r}", slow=True) as notes:
            entry = self._entry_of(model, variable)
            if entry is None:
                return self._adapt(uncompiled(model), variable, name, made, allow_missing, trainable, notes)
            if name not in entry.manager.configs:
                return self._put(entry, name, made, allow_missing, trainable, notes)
            return self._reconfigure(entry, name, made, allow_missing, trainable, notes)

    def preview(
        self,
        model: ModelLike,
        config: ConfigLike,
        *,
        name: str = "default",
        variable: str | None = None,
        **settings: Any,
    ) -> Preview:
        """What ``add`` would do, and what training would need. Changes nothing, does not take a bare model up.

        Args:
            model: a bare or an adapted model.
            config: of the adapter to come, or its fields.
            name: of the adapter to come.
            variable: what to call a model that is new here.
            **settings: of the memory forecast, as for ``plan_memory``.

        Raises:
            ConfigError: a field is unknown or impossible.
            TargetError: the targets do not match the model.
        """
        made = build_config(config)
        with self._command("planning") as notes:
            entry = self._entry_of(model, variable)
            base = entry.manager.model if entry is not None else uncompiled(model)
            title = entry.name if entry is not None else variable or "model"
            replaces = entry is not None and name in entry.manager.configs
            preview = preview_of(base, made, name=name, model_name=title, replaces=replaces, notes=notes)
            return dataclasses.replace(preview, memory=foreseen(base, made, title, settings))

    def load(
        self,
        source: str | os.PathLike[str],
        *,
        name: str | None = None,
        model: ModelLike = None,
        variable: str | None = None,
        trainable: bool = False,
    ) -> LoadResult:
        """Loads a saved adapter under a new name; the first adapter of a model becomes active.

        Args:
            source: a folder or a hub id.
            name: None: the last part of ``source``.
            model: a bare or an adapted model.
            variable: what to call a model that is new here.
            trainable: whether it trains while it is active.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or belongs to another base.
            AdapterExistsError: the name is taken.
        """
        from nbpeft.model import PeftModel

        place = place_of(source, "load")
        chosen = adapter_name(adapter_name_of(place) if name is None else name, given=name is not None)
        with self._command(f"loading {chosen!r}", slow=True) as notes, folder_hint(place):

            def loaded(entry: Entry) -> LoadResult:
                state = entry.state()
                return LoadResult(_hold(entry), entry.name, place, _adapter(state, chosen), state, tuple(notes))

            entry = self._entry_of(model, variable)
            if entry is not None:
                self._refuse_taken(entry, chosen)
                entry.model.load_adapter(place, chosen, is_trainable=trainable)
                self._stale = True
                return loaded(entry)
            bare = uncompiled(model)
            handle = PeftModel.from_pretrained(bare, place, adapter_name=chosen, is_trainable=trainable)
            with _bare_again_on_failure(handle):
                entry = self._book.prepare(variable, handle)
                result = loaded(entry)
            self._book.add(entry)
            self._stale = True
            return result

    def save(self, folder: str | os.PathLike[str], *, name: str | None = None, model: ModelLike = None) -> SaveResult:
        """Saves adapters in PEFT's format, each folder whole or not at all.

        Args:
            folder: one adapter is written right into it, several each into a folder of its name.
            name: None: all of the model's adapters.
            model: an adapted model.

        Raises:
            UnknownAdapterError: there is no such adapter.
            CheckpointError: the folder cannot be written.
        """
        place = place_of(folder, "save")
        entry = self._book.get(model)
        names = (name,) if name is not None else entry.manager.names
        entry.manager.require(*names)
        if not names:
            raise AdapterError(f"{entry.name} has no adapter to save")
        with self._command(f"saving {', '.join(names)}", slow=True) as notes:
            saved = save_adapters(entry.model, place, names)
            return SaveResult(entry.name, saved, tuple(notes))

    def delete(self, name: str, *, model: ModelLike = None) -> CommandResult:
        """Takes an adapter out of the model.

        Raises:
            UnknownAdapterError: there is no such adapter.
            MergeError: adapters are merged.
        """
        entry = self._book.get_for("delete", model)
        with self._command(f"deleting {name!r}") as notes:
            entry.manager.remove(name)
            done = self._done(entry, f"deleted {name!r}", notes)
            entry.asked.pop(name, None)
            return done

    def rename(self, name: str, new: str, *, model: ModelLike = None) -> CommandResult:
        """Renames an adapter.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterExistsError: the new name is taken.
        """
        entry = self._book.get_for("rename", model)
        with self._command(f"renaming {name!r}") as notes:
            entry.manager.rename(name, new)
            done = self._done(entry, f"renamed {name!r} to {new!r}", notes)
            if name in entry.asked:
                entry.asked[new] = (entry.manager.configs[new], entry.asked.pop(name)[1])
            return done

    def copy(self, name: str, new: str, *, model: ModelLike = None) -> CommandResult:
        """Copies an adapter under a new name.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterExistsError: the new name is taken.
        """
        entry = self._book.get(model)
        with self._command(f"copying {name!r}") as notes:
            entry.manager.copy(name, new)
            return self._done(entry, f"copied {name!r} to {new!r}", notes)

    # Inside

    def _adapt(
        self,
        bare: Any,
        variable: str | None,
        name: str,
        config: AdapterConfig,
        allow_missing: bool,
        trainable: bool,
        notes: list[str],
    ) -> AddResult:
        """Adapts a bare model; checks everything before it is touched."""
        from nbpeft.engine.plan import plan
        from nbpeft.model import get_peft_model

        planned = plan(bare, config, allow_missing=allow_missing)
        with HeldInterrupts():
            handle = get_peft_model(bare, config, adapter_name=name)
            with _bare_again_on_failure(handle):
                if not trainable:
                    handle.manager.freeze(name)
                entry = self._book.prepare(variable, handle)
                result = self._added(entry, name, notes, plan=planned)
                entry.asked[name] = (entry.manager.configs[name], meaning(config))
            self._book.add(entry)
            self._stale = True
        return result

    def _put(
        self,
        entry: Entry,
        name: str,
        config: AdapterConfig,
        allow_missing: bool,
        trainable: bool,
        notes: list[str],
        reconfigured: bool = False,
    ) -> AddResult:
        """Puts an adapter on an adapted model and activates it."""
        from nbpeft.model import files

        manager, asked = entry.manager, meaning(config)
        named = files.with_base_name(config, manager.model)
        put = manager.prepare(name, named, trainable=trainable, allow_missing=allow_missing, replace=reconfigured)
        with manager.transaction():
            plan = put()
            manager.activate(name)
        result = self._added(entry, name, notes, plan=plan, reconfigured=reconfigured)
        entry.asked[name] = (manager.configs[name], asked)
        return result

    def _reconfigure(
        self, entry: Entry, name: str, config: AdapterConfig, allow_missing: bool, trainable: bool, notes: list[str]
    ) -> AddResult:
        present = entry.manager.configs[name]
        asked = entry.asked.get(name)
        known = asked[1] if asked is not None and asked[0] is present else meaning(present)
        if known == meaning(config):
            if name not in entry.manager.active:
                notes.append(f"{name!r} is not active; %lora use {name} switches to it")
            result = self._added(entry, name, notes, unchanged=True)
            self._book.enter(entry.name, entry.model)
            return result
        notes.append("its weights start anew")
        return self._put(entry, name, config, allow_missing, trainable, notes, reconfigured=True)

    def _added(self, entry: Entry, name: str, notes: list[str], **more: Any) -> AddResult:
        state = entry.state()
        return AddResult(
            _hold(entry), entry.name, _adapter(state, name), state, notes=tuple(dict.fromkeys(notes)), **more
        )

    def _refuse_taken(self, entry: Entry, name: str) -> None:
        if name in entry.manager.configs:
            raise AdapterExistsError(
                f"{entry.name} has an adapter {name!r} already; give the loaded one another name (--name) "
                f"or delete {name!r} first",
                name=name,
            )


@contextmanager
def _bare_again_on_failure(handle: PeftModel) -> Iterator[None]:
    """Takes a new handle's adapters off its model again where the block does not end well."""
    try:
        yield
    except BaseException:
        with HeldInterrupts(to_the_end=True):
            handle.unload()
        raise


def _hold(entry: Entry) -> ModelRef:
    return ModelRef(entry.model, reviver(entry.manager.model))


def _adapter(state: ModelState, name: str) -> AdapterState:
    found = next((item for item in state.adapters if item.name == name), None)
    if found is None:
        raise UnknownAdapterError(f"no adapter {name!r} on {state.name}", name=name)
    return found
