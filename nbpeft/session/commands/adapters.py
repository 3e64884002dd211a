"""Adding, previewing, loading, saving, deleting, renaming and copying adapters."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import (
    AdapterError,
    AdapterExistsError,
    CheckpointNotFoundError,
    UnknownAdapterError,
    check_text,
    few,
)
from nbpeft.names import DEFAULT_ADAPTER
from nbpeft.session.checks import adapter_name, place_of
from nbpeft.session.commands.planning import plan_or_reason
from nbpeft.session.configs import build_config, meaning
from nbpeft.session.handles import rehandle, uncompiled
from nbpeft.session.init_rows import InitRows, starting_from
from nbpeft.session.preview import preview_of
from nbpeft.session.results import AddResult, LoadResult, ModelRef, Preview, SavedAdapter, SaveResult
from nbpeft.session.sweeps import all_or_none, configs_of
from nbpeft.session.undoable import Undoable, unsaved_words
from nbpeft.sweeps import largest_of, swept

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.checkpoint import CardFacts
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.injection.injection_plan import InjectionPlan
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.model import PeftModel
    from nbpeft.session.context import ConfigLike, ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.session.results import CommandResult
    from nbpeft.state import AdapterState, ModelState

_CONFIG_FILE = "adapter_config.json"


def add(
    ctx: SessionContext,
    model: ModelLike,
    config: ConfigLike,
    *,
    name: str = "default",
    variable: str | None = None,
    allow_missing: bool = False,
    trainable: bool = True,
    init_data: Any = None,
    init_rows: int | None = None,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> AddResult:
    """Configure and apply an adapter; an existing adapter with that name is reconfigured.

    With ``sweep(…)`` as the value of a field, one adapter is added per value, named ``NAME-r8`` and so on. The first is
    active, and the next training trains all of them side by side.

    Args:
        model: a bare or an adapted model.
        config: a config, or its fields.
        name: name of the adapter.
        variable: name for a model that the session does not know yet.
        allow_missing: ignore targets that match nothing, as long as others match.
        trainable: whether the adapter is trained while it is active.
        init_data: rows for ``init_lora_weights`` ``"eva"``, ``"corda"`` or ``"lora_ga"``, in any form that ``train``
            accepts. The model is run on them before anything is changed.
        init_rows: number of rows to use; 256 if left out.
        tokenizer: tokenizer for ``init_data``, as for ``train``; by default the one last used with the model.
        columns: columns of ``init_data``, as for ``train``.
        max_length: maximal length of ``init_data`` in tokens, as for ``train``.

    Raises:
        ConfigError: a field is unknown or invalid, or the init needs rows.
        TargetError: the targets do not match the model.
        TrainingError: the rows cannot be read.
    """
    from nbpeft.engine.changes.random_numbers import random_state
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.engine.tree.model_tree import manager_of
    from nbpeft.model.handle.peft_model import handle_of_plan

    adapter_name(name)
    rows = InitRows.of(init_data, init_rows, tokenizer, columns, max_length)
    if isinstance(config, Mapping) and swept(config):
        options = {"variable": variable, "allow_missing": allow_missing, "trainable": trainable, "init_data": rows}
        return _add_sweep(ctx, model, config, name, **options)
    made = build_config(config, instead_of=_present(ctx, model, name))
    fields, written = meaning(made), tuple(config) if isinstance(config, Mapping) else ()
    with ctx.command(f"adding {name!r}", slow=True) as notes:
        tracked, first_random = ctx.find(model, variable, command="add"), random_state()
        if tracked is None:
            bare: Any = uncompiled(model)
            manager = manager_of(bare) or AdapterManager(bare)
            planned = manager.plan(completed(made, None, bare), name, allow_missing=allow_missing)
            with starting_from(ctx, bare, made, rows, notes) as start, DeferredInterrupts():
                handle = handle_of_plan(manager, planned, made, name)
                with _unloaded_on_failure(handle):
                    start(handle.manager, name)
                    if not trainable:
                        handle.manager.freeze(name)
                    tracked = ctx.models.new(variable, handle)
                    result = _added(tracked, name, fields, notes, written, plan=planned)
                    tracked.first_random[name] = (handle.manager.configs[name], first_random)
                ctx.models.select(tracked)
                ctx.changed = True
            return result
        manager = tracked.manager
        present = name in manager.configs
        if present and tracked.requested_fields(name) == fields:
            if manager.active != (name,) or not manager.enabled:
                manager.activate(name, enable=True)
                notes.append(f"{name!r} is active now")
            if rows is not None:
                notes.append(f"the rows were not read again; to initialize it again, session.delete({name!r}) first")
            result = _added(tracked, name, None, notes, written, unchanged=True)
            ctx.models.select(tracked)
            return result
        planned = manager.plan(completed(made, tracked, manager.model), name, allow_missing=allow_missing)
        put = _reconfigure if present else _add_to
        put(ctx, tracked, name, planned, rows, notes, trainable=trainable)
        tracked.first_random[name] = (manager.configs[name], first_random)
        return _added(tracked, name, fields, notes, written, plan=planned, reconfigured=present)


def _add_to(
    ctx: SessionContext,
    tracked: TrackedModel,
    name: str,
    planned: InjectionPlan,
    rows: InitRows | None,
    notes: list[str],
    *,
    trainable: bool,
) -> None:
    """Add a new adapter to a model that has others, and activate it."""
    manager = tracked.manager
    with starting_from(ctx, manager.model, planned.config, rows, notes) as start:
        put = manager.prepare(name, planned, trainable=trainable, training=trainable)
        with manager.transaction():
            put()
            manager.activate(name, enable=True)
            start(manager, name)


def _add_sweep(
    ctx: SessionContext, model: ModelLike, config: Mapping[str, Any], stem: str, **options: Any
) -> AddResult:
    """Add an adapter for every combination of values, all or none, each with the same random numbers."""
    from nbpeft.engine.changes.random_numbers import drawing_from, random_state

    wanted, state = configs_of(config, stem), random_state()
    for name, fields in wanted.items():
        adapter_name(name)
        build_config(fields, instead_of=_present(ctx, model, name))
    with ctx.command(f"adding {len(wanted)} adapters", slow=True), all_or_none(ctx, model):
        notes: list[str] = []
        for name, fields in wanted.items():
            with drawing_from(state):
                added = add(ctx, model, fields, name=name, **options)
            model = added.model
            notes += [note for note in added.notes if note not in notes and "is active now" not in note]
        tracked = ctx.models.get(model)
        tracked.manager.activate(next(iter(wanted)), enable=True)
        tracked.sweep = tuple(wanted)
        present = {item.name: item for item in tracked.state().adapters}
        first, *others = (present[name] for name in wanted)
        notes.append("the next training trains them side by side")
        return dataclasses.replace(
            added, adapter=first, others=tuple(others), state=tracked.state(), notes=tuple(notes), unchanged=False
        )


def _reconfigure(
    ctx: SessionContext,
    tracked: TrackedModel,
    name: str,
    planned: InjectionPlan,
    rows: InitRows | None,
    notes: list[str],
    *,
    trainable: bool,
) -> None:
    """Reconfigure an adapter; its weights are preserved if they have the same meaning with the new config."""
    from nbpeft.checkpoint import prompt_format, set_prompt_format
    from nbpeft.engine.runtime.snapshots import keeps_weights

    manager, undoable = tracked.manager, Undoable(ctx, tracked, name, "reconfigured")
    former = manager.configs[name]
    steps = tracked.steps_of([name])
    kept, stays = undoable.kept, rows is None and keeps_weights(manager, name, planned)
    weights = kept.weights.copied() if stays else None
    half = stays and kept.half
    options: dict[str, Any] = {"trainable": trainable, "training": trainable, "half": half, "replace": True}
    with nullcontext() if stays else starting_from(ctx, manager.model, planned.config, rows, notes) as start:
        put = manager.prepare(name, planned, weights, **options)
        with undoable.change():
            put()
            manager.activate(name, enable=True)
            if start is not None:
                start(manager, name)
            else:
                set_prompt_format(manager.configs[name], prompt_format(former))
                manager.set_scale(name, kept.scale)
                manager.unsaved |= {name} if kept.unsaved else set()
    if stays and steps[0]:
        tracked.trained_steps[name] = (manager.configs[name], *steps)
    notes.append(_weights_message(stays=stays, unsaved=kept.unsaved))


def _weights_message(*, stays: bool, unsaved: bool, done: bool = True) -> str:
    """Return a note about the weights of an adapter that was reconfigured, or would be if it is not ``done``."""
    which = "trained weights" if unsaved else "weights"
    if stays:
        return f"its {which} {'stay' if done else 'would stay'} as they are"
    back = "session.undo() restores the trained ones" if unsaved else "session.undo() restores the old ones"
    return f"its weights {'are' if done else 'would be'} initialized again{'; ' + back if done else ''}"


def preview(
    ctx: SessionContext,
    /,
    model: ModelLike,
    config: ConfigLike,
    *,
    name: str = "default",
    variable: str | None = None,
    **settings: Any,
) -> Preview:
    """Report what ``add`` would do and what training would need; nothing is changed or tracked.

    Args:
        model: a bare or an adapted model.
        config: config of the new adapter, or its fields.
        name: name of the new adapter.
        variable: name for a model that the session does not know yet.
        **settings: settings of the memory forecast, as for ``plan``.

    Raises:
        ConfigError: a field is unknown or invalid.
        TargetError: the targets do not match the model.
    """
    from nbpeft.engine.injection.plan import plan
    from nbpeft.engine.runtime.snapshots import keeps_weights

    check_text("name", name)
    count = 1
    if isinstance(config, Mapping):
        config, count = largest_of(config)
    made = build_config(config, instead_of=_present(ctx, model, name))
    with ctx.command("planning") as notes:
        if count > 1:
            notes.append(f"{count} adapters, to be trained side by side; this is the largest")
            settings = {"num_adapters": count, **settings}
        tracked = ctx.find(model, variable, command="preview")
        base = tracked.manager.model if tracked is not None else uncompiled(model)
        title = tracked.name if tracked is not None else variable or "model"
        replaces = tracked is not None and name in tracked.manager.configs
        made = completed(made, tracked, base)
        planned = plan(base, made, replacing=name if replaces else None)
        if tracked is not None and replaces:
            stays = keeps_weights(tracked.manager, name, planned)
            notes.append(_weights_message(stays=stays, unsaved=name in tracked.manager.unsaved, done=False))
        result = preview_of(base, planned, name=name, model_name=title, replaces=replaces, notes=notes)
        return dataclasses.replace(result, memory=plan_or_reason(base, made, title, settings))


def completed(config: AdapterConfig, tracked: TrackedModel | None, base: nn.Module) -> AdapterConfig:
    """Return a config as it is used on a base model, with the heads of its task, which are trained too.

    Args:
        config: the config.
        tracked: the session's model, if it knows it.
        base: the base model.
    """
    from nbpeft.model import PeftModel

    kind = PeftModel.for_task(config) if tracked is None else type(tracked.model)
    return kind.completed(config, base)


def _present(ctx: SessionContext, model: ModelLike, name: str) -> AdapterConfig | None:
    """Return the config of the adapter with this name, if the model has one."""
    from nbpeft.engine.tree.model_tree import manager_of

    manager = manager_of(
        ctx.models.get(model, command="add").model if model is None or isinstance(model, str) else model
    )
    return None if manager is None else manager.configs.get(name)


def load(
    ctx: SessionContext,
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    model: ModelLike = None,
    variable: str | None = None,
    trainable: bool = False,
    replace: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> LoadResult:
    """Load a saved adapter under a new name; the first adapter of a model becomes active.

    Args:
        source: a folder, a file in kohya's or diffusers' format, or a hub id, optionally followed by ``@`` and a
            revision.
        name: name to give the adapter; None for the last component of ``source``, or of ``subfolder``.
        model: a bare or an adapted model.
        variable: name for a model that the session does not know yet.
        trainable: whether the adapter is trained while it is active.
        replace: replace an existing adapter with that name.
        revision: branch, tag or commit on the hub; None for the main branch.
        subfolder: folder of the adapter in ``source``.
        token: access token for the hub; None for ``HF_TOKEN``, the hub's login, or a secret of Colab or Kaggle.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or belongs to another base.
        AdapterExistsError: the name is taken.
        AdapterError: the model has no data (meta device).
    """
    from nbpeft.checkpoint import reading_token
    from nbpeft.engine.tree.model_tree import check_has_data
    from nbpeft.model import PeftModel

    check_text("subfolder", subfolder, optional=True)
    place, revision = _revision_in(place_of(source, "load"), revision)
    chosen = adapter_name(_name_from(subfolder or place) if name is None else name, given=name is not None)
    hub: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "token": reading_token(token)}
    with ctx.command(f"loading {chosen!r}", slow=True) as notes, nested_adapters_in_error(place):

        def loaded(tracked: TrackedModel) -> LoadResult:
            state, more = tracked.state(), _notes_of_mode(tracked.manager, chosen)
            if chosen in tracked.manager.frozen:
                where = f", model={tracked.name!r}" if {*ctx.models.all()} - {tracked} else ""
                more.append(f"it is frozen: session.freeze({chosen!r}, off=True{where}) makes it trainable")
            return LoadResult(
                _reference(tracked), tracked.name, place, adapter_in(state, chosen), state, notes=(*notes, *more)
            )

        tracked = ctx.find(model, variable, command="load")
        bare = uncompiled(model)
        check_has_data(bare if tracked is None else tracked.model)  # on the meta device the values would be lost
        if tracked is not None:
            _load_another(ctx, tracked, place, chosen, trainable=trainable, replace=replace, hub=hub)
            ctx.changed = True
            return loaded(tracked)
        handle = PeftModel.from_pretrained(bare, place, adapter_name=chosen, is_trainable=trainable, **hub)
        with _unloaded_on_failure(handle):
            tracked = ctx.models.new(variable, handle)
            result = loaded(tracked)
        ctx.models.select(tracked)
        ctx.changed = True
        return result


def _load_another(
    ctx: SessionContext,
    tracked: TrackedModel,
    place: str,
    name: str,
    *,
    trainable: bool,
    replace: bool,
    hub: Mapping[str, Any],
) -> None:
    """Load an adapter onto a model that already has adapters."""
    taken = name in tracked.manager.configs
    if taken and not replace:
        there = f"{tracked.name} has an adapter {name!r} already{unsaved_words(tracked.manager, name)}"
        raise AdapterExistsError(
            f"{there}; give the loaded one another name (name=…), or replace it (replace=…)", name=name
        )
    put = tracked.model.prepare_load(place, name, is_trainable=trainable, **hub)
    with Undoable(ctx, tracked, name, "replaced").change() if taken else nullcontext():
        put()


def save(
    ctx: SessionContext,
    folder: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    model: ModelLike = None,
    replace: bool = False,
) -> SaveResult:
    """Save adapters in PEFT's format, all of them completely or none.

    Args:
        folder: folder for one adapter; several adapters are saved in subfolders with their names.
        adapter: its name; None for all of the model's adapters.
        model: an adapted model.
        replace: overwrite another adapter in a folder: one with another name, base model or other tensors. If that was
            the only copy of an adapter of this process, that adapter is marked as not saved.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: a folder has another adapter.
        CheckpointError: the folder cannot be written.
    """
    from nbpeft.model.saving import files

    place = place_of(folder, "save")
    tracked = ctx.models.get(model, command="save", adapters=(adapter,))
    names = (adapter,) if adapter is not None else tracked.manager.names
    tracked.manager.require(*names)
    if not names:
        raise AdapterError(f"{tracked.name} has no adapter to save")
    with ctx.command(f"saving {', '.join(names)}", slow=True) as notes:
        facts = _facts(tracked, names[0]) if len(names) == 1 else None
        written = files.save(
            tracked.manager, place, names=list(names), flat=len(names) == 1, replace=replace, facts=facts
        )
        saved = tuple(
            SavedAdapter(
                name,
                str(Path(made.paths[0]).parent) if made.paths else place,
                tuple(sorted(Path(path).name for path in made.paths)),
                made.byte_count,
            )
            for name, made in written.items()
        )
        for one in saved:
            _note_with_run(ctx, tracked, one)
            if tracked.steps_of((one.name,))[0]:
                notes += _note_on_head(tracked, one.name)
        return SaveResult(tracked.name, saved, notes=tuple(notes))


def _note_on_head(tracked: TrackedModel, name: str) -> list[str]:
    """Return a note if the folder lacks a new head, without which the adapter means nothing."""
    from nbpeft.training.adapters.learning_check import frozen_head

    return [note for note in [frozen_head(tracked.model, name)] if note]


def _facts(tracked: TrackedModel, name: str) -> CardFacts:
    """Return what the README of a saved adapter says in addition to the config; its loss curve stays in the run."""
    from nbpeft.session.commands.pushing import card_facts

    return dataclasses.replace(card_facts(tracked, name, "path/to/this/folder", name, example=True), curve="")


def _note_with_run(ctx: SessionContext, tracked: TrackedModel, saved: SavedAdapter) -> None:
    """Record where an adapter was saved in the run that trained it last, so that the run can delete its own copy."""
    from nbpeft.session.commands.training import run_place

    _, run_id = tracked.steps_of((saved.name,))
    place = run_place(ctx) if run_id else None
    if place is not None:
        place.store.mark_saved(run_id, saved.name, saved.folder)


def delete(ctx: SessionContext, name: str | Sequence[str], *, model: ModelLike = None) -> CommandResult:
    """Delete an adapter from the model, or several, all or none; ``undo`` restores them one by one.

    Args:
        name: name of the adapter, or several names.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: adapters are merged.
    """
    from nbpeft.engine.config.adapter_names import names_in

    names = names_in(name)
    tracked = ctx.models.get(model, command="delete", adapters=names)
    if not names:
        raise AdapterError("nothing to delete: no adapter is named")
    described = few(names)
    with ctx.command(f"deleting {described}") as notes:
        manager, before = tracked.manager, tracked.manager.active
        unsaved = [one for one in names if one in manager.unsaved]
        with manager.transaction():
            manager.require(*names)
            for one in names:
                with Undoable(ctx, tracked, one, "deleted").change():
                    manager.remove(one)
        if unsaved:
            restored = "it was trained and not saved; session.undo() restores it"
            several = f"not saved after training: {few(unsaved)}; each session.undo() restores one, the last first"
            notes.append(several if len(names) > 1 else restored)
        if {*names} & {*before} and manager.active and set(manager.active) - set(before):
            notes.append(f"{manager.active[0]!r} is active now")
        return ctx.result(tracked, f"deleted {described}", notes)


def rename(ctx: SessionContext, name: str, new: str, *, model: ModelLike = None) -> CommandResult:
    """Rename an adapter.

    Args:
        name: name of the adapter.
        new: its new name.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: the new name is taken.
    """
    tracked = ctx.models.get(model, command="rename", adapters=(name,))
    with ctx.command(f"renaming {name!r}") as notes:
        tracked.manager.rename(name, new)
        result = ctx.result(tracked, f"renamed {name!r} to {new!r}", notes)
        for known in (tracked.requested, tracked.first_random):
            if name in known:
                known[new] = (tracked.manager.configs[new], known.pop(name)[1])
        tracked.written[new] = tracked.written.pop(name, ())
        return result


def copy(ctx: SessionContext, name: str, new: str, *, model: ModelLike = None) -> CommandResult:
    """Copy an adapter under a new name.

    Args:
        name: name of the adapter.
        new: name of the copy.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: the new name is taken.
    """
    tracked = ctx.models.get(model, command="copy", adapters=(name,))
    with ctx.command(f"copying {name!r}") as notes:
        tracked.manager.copy(name, new)
        tracked.requested[new] = (tracked.manager.configs[new], tracked.requested_fields(name))
        tracked.written[new] = tracked.written.get(name, ())
        return ctx.result(tracked, f"copied {name!r} to {new!r}", notes)


def _added(
    tracked: TrackedModel,
    name: str,
    fields: dict[str, Any] | None,
    notes: list[str],
    written: tuple[str, ...],
    **more: Any,
) -> AddResult:
    """Return the result of adding an adapter, and record the fields with which it was requested, if they are new."""
    state, notes = tracked.state(), [*notes, *_notes_of_mode(tracked.manager, name), *_note_on_head(tracked, name)]
    result = AddResult(
        _reference(tracked), tracked.name, adapter_in(state, name), state, notes=tuple(dict.fromkeys(notes)), **more
    )
    if fields is not None:
        tracked.requested[name] = (tracked.manager.configs[name], fields)
    tracked.written[name] = written
    return result


def _notes_of_mode(manager: AdapterManager, name: str) -> list[str]:
    """Return a note if an adapter is in training mode but its base is not, which matters for the user's own calls.

    (Commands run the model in evaluation mode.) There is no note for an adapter that computes the same in both modes.
    """
    from nbpeft.engine.contract.registry import method_of
    from nbpeft.engine.runtime.adapter_tensors import is_training

    config = manager.configs[name]
    if manager.model.training or not is_training(manager.layers, name):
        return []
    fields = [field.name for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    random = [f"{field} = {rate:g}" for field in fields if (rate := getattr(config, field) or 0)]
    random += [f"the randomness of {method_of(config).label}"] if method_of(config).draws_in_training else []
    return [f"{' and '.join(random)} affects your own calls of the model until model.eval()"] if random else []


@contextmanager
def _unloaded_on_failure(handle: PeftModel) -> Iterator[None]:
    """Unload a new PeftModel's adapters from its base model if the block fails."""
    try:
        yield
    except BaseException:
        with DeferredInterrupts(to_the_end=True):
            handle.unload()
        raise


def _reference(tracked: TrackedModel) -> ModelRef:
    return ModelRef(tracked.model, rehandle(tracked.manager.model))


def adapter_in(state: ModelState, name: str) -> AdapterState:
    """Return an adapter in the state of a model.

    Args:
        state: state of the model.
        name: name of the adapter.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    adapter = next((item for item in state.adapters if item.name == name), None)
    if adapter is None:
        raise UnknownAdapterError(f"no adapter {name!r} on {state.name}", name=name)
    return adapter


def _revision_in(source: str, given: str | None) -> tuple[str, str | None]:
    """Split a source such as ``user/name@v1`` into the source and its revision, unless it is an existing path."""
    place, at, revision = source.rpartition("@")
    if not at or not revision or place.count("/") != 1 or os.path.exists(source):
        return source, given
    if given not in (None, revision):
        raise AdapterError(f"load: {source} and revision={given!r:.60} name different revisions")
    return place, revision


def _name_from(source: str) -> str:
    """Return a name for the adapter in a folder, file or hub repository: the last component, with dots as ``_``."""
    last = re.split(r"[/\\]+", source.rstrip("/\\"))[-1].removesuffix(".safetensors")
    return re.sub(r"[^\w-]+", "_", last).strip("_") or DEFAULT_ADAPTER


@contextmanager
def nested_adapters_in_error(source: str) -> Iterator[None]:
    """Mention the adapters in subfolders in the error if the folder itself has none."""
    try:
        yield
        return
    except CheckpointNotFoundError as error:
        failure = error
    inside = (
        sorted(path.parent.name for path in Path(source).glob(f"*/{_CONFIG_FILE}")) if os.path.isdir(source) else []
    )
    if inside:
        examples = " or ".join(os.path.join(source, name) for name in inside[:3])
        raise CheckpointNotFoundError(f"{source} holds no adapter itself; did you mean {examples}?", **failure.details)
    raise failure
