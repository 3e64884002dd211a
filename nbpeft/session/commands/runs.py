"""Runs on disk: listing and comparing them, resuming an interrupted one, renaming and deleting."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft._util.paths import from_here
from nbpeft.confidential import masked
from nbpeft.errors import (
    AdapterError,
    BaseMismatchError,
    BusyError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    TrainingError,
    check_text,
    few,
    shortened,
)
from nbpeft.names import DEFAULT_ADAPTER
from nbpeft.session.checks import place_of
from nbpeft.session.commands.adapters import load
from nbpeft.session.commands.running import lift_pause, paused_training, runs_by_name
from nbpeft.session.commands.training import run_place, train_tracked
from nbpeft.session.context import is_off
from nbpeft.session.handles import is_module, rehandle, uncompiled
from nbpeft.session.results import LineResult, ModelRef
from nbpeft.session.results.kept_runs import (
    SORTS,
    ResumeResult,
    RunCard,
    RunsComparison,
    RunsResult,
    adapters_with_rows,
    curve_names,
    sorted_records,
)
from nbpeft.session.results.training import RequestResult
from nbpeft.session.sweeps import restore
from nbpeft.state import TrainState

if TYPE_CHECKING:
    from nbpeft.runs.folder import RunFolder
    from nbpeft.runs.record import RunRecord
    from nbpeft.runs.store import RunStore
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.state import Curve, NamedRows
    from nbpeft.training import Run

_SAME = ("peft_type", "r", "lora_alpha")
"""Settings whose values must be equal for an adapter to be that of a run."""


def runs_folder(ctx: SessionContext, /, folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of the runs, or use another one from now on.

    Args:
        folder: a folder that survives the machine, e.g. one on a mounted drive; it is created with the first run, and
            the folder around it has to exist. ``"off"`` saves no runs. None changes nothing.

    Returns:
        The folder; None if no runs are saved.

    Raises:
        BusyError: a training is running.
        CheckpointError: runs cannot be saved there.
    """
    if folder is None:
        return ctx.runs_folder
    for run in ctx.runs.values():
        raise BusyError(f"training {run.state.adapter} is running and is saved in {ctx.runs_folder}: wait or stop it")
    text = os.fspath(folder) if folder == "" else place_of(folder, "runs_folder")
    if not is_off(text):
        _check_writable(Path(ctx.home, os.path.expanduser(text)))
    ctx.chosen_runs_folder = text
    return ctx.runs_folder


def _check_writable(path: Path) -> None:
    """Refuse a folder for runs that is a file, cannot be written, or is below a folder that does not exist."""
    from nbpeft.checkpoint.inside import is_there, leads_to_folder

    there = path if is_there(path) else path.parent
    if not is_there(there):
        raise CheckpointError(f"there is no folder {there} for {path.name!r}: mount or create it first", path=str(path))
    if not leads_to_folder(there):
        raise CheckpointError(f"{there} is not a folder, so runs cannot be saved in {path}", path=str(path))
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"{there} cannot be written, so runs cannot be saved in {path}", path=str(path))


def runs(
    ctx: SessionContext, /, *names: str, sort: str | None = None, search: str | None = None
) -> RunsResult | RunsComparison:
    """List the saved runs, or compare some of them.

    Args:
        *names: names of runs to compare; without any, all runs are listed.
        sort: ``time`` (newest first), ``result``, ``eval``, ``best``, ``steps``, ``seconds``, ``name``, ``status``, or
            a setting, such as ``learning_rate``; by default ``time``.
        search: lists only the runs that have each of these words in their name, adapter, model, status, note or
            settings, in any case.

    Raises:
        CheckpointNotFoundError: there is no such run.
        CheckpointError: the folder of the runs cannot be read, or none of the runs to compare.
        ConfigError: the sort order is unknown, or an order or a search is given for runs to compare; or an argument is
            not a text.
    """
    from nbpeft.runs.record import UNREADABLE, curve_of

    for name in names:
        check_text("the name of a run", name)
    check_text("sort", sort, optional=True)
    check_text("search", search, optional=True)
    store = _store(ctx)
    if not names:
        listed = [_listed(record) for record in sorted_records(tuple(store.records()), sort or SORTS[0])]
        records, curves = (tuple(part) for part in zip(*listed, strict=True)) if listed else ((), ())
        return RunsResult(str(from_here(store.place)), records, curves).matching(search or "")
    for name in (name for name, given in (("sort", sort), ("search", search)) if given is not None):
        raise ConfigError(f"{name} is for the list of all runs, and {few(names)} would be compared", field=name)
    found = [_with_entries(store.find(name)) for name in dict.fromkeys(names)]
    if all(record.status == UNREADABLE for record, _ in found):
        raise _cannot_be_read(found[0][0])
    return RunsComparison(
        records=tuple(record for record, _ in found),
        curves={
            name: tuple(
                (curve_of(logged if name in record.headline else (), name), curve_of(logged, f"eval_{name}"))
                for record, logged in found
            )
            for name in curve_names(record for record, _ in found)
        },
    )


def _listed(record: RunRecord) -> tuple[RunRecord, Curve]:
    """Return a run as the list shows it, and the first curve of its headline, which is empty if it cannot be read."""
    from nbpeft.runs.folder import RunFolder
    from nbpeft.runs.record import UNREADABLE, curve_of, with_best_metrics

    try:
        entries = [] if record.status == UNREADABLE else RunFolder(Path(record.path)).entries()
    except CheckpointError:
        entries = []
    return with_best_metrics(record, entries), curve_of(entries, next(iter(record.headline), "loss"))


def _with_entries(folder: RunFolder) -> tuple[RunRecord, list[Any]]:
    """Return the record of a run and its log entries, which are empty for a run that cannot be read."""
    from nbpeft.runs.record import UNREADABLE, unreadable, with_best_metrics

    record = folder.record()
    try:
        entries = [] if record.status == UNREADABLE else folder.entries()
        return with_best_metrics(record, entries), entries
    except CheckpointError as error:
        return replace(unreadable(record.name, record.path, error.message), id=record.id), []


def _cannot_be_read(record: RunRecord) -> CheckpointError:
    return CheckpointError(f"run {record.name} cannot be read: {record.message}")


def rename_run(ctx: SessionContext, name: str, new: str, *, run_id: str | None = None) -> LineResult:
    """Rename a run that has ended.

    Args:
        name: name of the run.
        new: its new name.
        run_id: ``id`` of its record, to refuse another run that has the name by now.

    Raises:
        CheckpointError: there is no such run, the new name is taken, or the run is still running or another one.
    """
    check_text("name", name)
    check_text("new", new)
    _store(ctx).rename(name, new, run_id)
    return LineResult(f"renamed run {name} to {new}")


def note_run(ctx: SessionContext, name: str, note: str, *, run_id: str | None = None) -> LineResult:
    """Write a note on a run that has ended, in place of the one that it has.

    Args:
        name: name of the run.
        note: the note, which is kept as one line; an empty one removes it.
        run_id: see ``rename_run``.

    Raises:
        CheckpointError: there is no such run, it is still running or another one, or the note is too long.
    """
    check_text("name", name)
    check_text("note", note)
    _store(ctx).note(name, note, run_id)
    without = "" if masked(note) == note else " without its access token or password"
    return LineResult(f"the note on run {name} is saved{without}" if note.strip() else f"run {name} has no note")


def delete_run(ctx: SessionContext, name: str, *, run_id: str | None = None) -> LineResult:
    """Delete a run that has ended, with its folder; the adapter on the model is not changed.

    Args:
        name: the exact name of the run.
        run_id: see ``rename_run``.

    Raises:
        CheckpointError: there is no such run, or it is still running or another one.
    """
    check_text("name", name)
    _store(ctx).delete(name, run_id)
    return LineResult(f"deleted run {name}")


def find_run(ctx: SessionContext, run: str | None = None) -> tuple[Run, str] | RunCard:
    """Find a training to show: a running one, or the final state of one that has ended.

    Args:
        run: name of the run; None for the running one, or else the last one.

    Returns:
        The running training and the name of its model, to be shown live; or the card of a training that has ended or
        that another process runs.

    Raises:
        CheckpointNotFoundError: there is no such run.
        CheckpointError: it, or the folder of the runs, cannot be read.
    """
    from nbpeft.runs.record import UNREADABLE

    check_text("run", run, optional=True)
    live = [(name, found) for name, found in runs_by_name(ctx).items() if run in (None, Path(found.folder).name)]
    if live:
        name, found = live[-1]
        return found, name
    for tracked in ctx.models.all():
        train = tracked.training
        if train is None:
            continue
        now, last = ctx.run_name(train.kept_id), ctx.last_result
        if now == run if run is not None else last is not None and last.state.run_id == train.run_id:
            folder = "" if ctx.runs_folder is None or not now else str(ctx.runs_folder / now)
            return RunCard(replace(train, folder=folder), tracked.name, ctx.state)
    store = _store(ctx)
    records = [one for one in store.records() if run is None and one.status != UNREADABLE]
    if run is None and not records:
        raise CheckpointNotFoundError(f"no training ran in this session, and {store.place} contains no run")
    record = records[0] if run is None else _record(store, run)
    return RunCard(_state_of(store.find(record.name), record), record.model, record=record)


def _state_of(folder: RunFolder, record: RunRecord) -> TrainState:
    """Return the last state of a run, as far as its folder has it."""
    from nbpeft.runs.record import CRASHED
    from nbpeft.training.monitor.record import Record, is_measured

    numbers, series, metrics = Record(), folder.series(record.step), folder.facts().get("metrics") or {}
    numbers.resume(record.step, folder.entries())
    numbers.collect()
    crashed = f"crashed at {record.at}: its process ended" if record.status == CRASHED else ""
    status: Any = "stopped" if crashed else record.status
    return TrainState(
        run_id=record.name,
        adapter=record.adapter,
        adapters=record.adapters if len(record.adapters) > 1 else (),
        status=status,
        step=record.step,
        total_steps=record.total_steps,
        epoch=numbers.epoch,
        loss=record.loss,
        eval_loss=record.eval_loss,
        eval_step=numbers.evaluated[0] if numbers.evaluated else None,
        best_step=record.best_step,
        elapsed=record.seconds,
        history=numbers.history.points(),
        eval_history=numbers.eval_history.points(),
        message=crashed or record.message,
        errors=(crashed,) if crashed else (),
        metrics={name: float(value) for name, value in metrics.items() if isinstance(value, int | float)},
        series={name: points for name, points in series.items() if not is_measured(name)},
        metric_history={name: points for name, points in series.items() if is_measured(name)},
        samples=folder.samples(record.step),
        folder=record.path,
        kept_id=record.id,
        headline=tuple(record.headline),
    )


def kept_run(ctx: SessionContext, run: str | None = None) -> tuple[RunRecord, Mapping[str, Any]]:
    """Return the run that ``resume`` would continue, and the recorded facts about its start.

    Args:
        run: name of the run; None for the newest one.

    Raises:
        CheckpointNotFoundError: there is no such run, or it has no checkpoint; or the last training here left none.
        CheckpointError: the folder of the runs cannot be read.
        TrainingError: it is still running.
    """
    from nbpeft.runs.record import UNREADABLE

    check_text("run", run, optional=True)
    store = _store(ctx)
    records = store.records()
    ended = [record for record in records if record.status not in ("running", UNREADABLE)]
    if run is None and not ended:
        broken = "".join(f"; {record.name}: {record.message}" for record in records if record.status == UNREADABLE)
        raise CheckpointNotFoundError(
            f"there is nothing to resume: {store.place} contains no run that has ended{shortened(broken, 300)}"
        )
    # A run whose recorded start is in the future is only resumed by name.
    newest = next((record for record in ended if record.started <= time.time()), ended[0]) if ended else None
    if run is None and newest is not None:
        _refuse_another(ctx, newest)
    record = newest if run is None and newest is not None else _record(store, run or "")
    if record.status == "running":
        raise TrainingError(f"run {record.name} is still running")
    if not record.kept_steps:
        raise CheckpointNotFoundError(f"run {record.name} has no checkpoint left to resume from, only its curve")
    return record, store.find(record.name).facts()


def _refuse_another(ctx: SessionContext, newest: RunRecord) -> None:
    """Refuses to resume a run that is not named, if a model's last training was of another adapter and is not kept."""
    for train in (tracked.training for tracked in ctx.models.all()):
        if train is None or train.status not in ("failed", "stopped") or train.step > train.first_step:
            continue
        if not ctx.run_name(train.kept_id) and {*train.names}.isdisjoint(newest.adapters):
            raise CheckpointNotFoundError(
                f"the training of {train.adapter} {train.status} before its first step, and nothing of it is kept: "
                f"train again. The newest run is of {few(newest.adapters)}: session.resume({newest.name!r})"
            )


def resume(
    ctx: SessionContext,
    /,
    run: str | None = None,
    *,
    model: ModelLike = None,
    data: Any = None,
    eval_data: Any = None,
    tokenizer: Any = None,
    variable: str | None = None,
    named_rows: NamedRows | None = None,
    **arguments: Any,
) -> ResumeResult | RequestResult:
    """Continue a paused training, or resume an interrupted run from its last checkpoint.

    A paused training of this session continues where it waits, and takes no arguments but its run or its model. Of a
    run that was interrupted, the adapter's config and weights, the optimizer, the schedule and the random state are
    restored, so that the loss continues as without the interruption. For a run that had finished, only the adapter is
    restored.

    Args:
        run: name of the run; None for a paused training, or else the newest run.
        model: the base model of the run, bare or adapted; by default the session's model with the name that the run's
            model had.
        data: the training data of the run; not used for a run that had finished, as the result's ``notes`` say.
        eval_data: its evaluation data, if it had any.
        tokenizer: as for ``train``.
        variable: name for a model that the session does not know yet.
        named_rows: as for ``train``.
        **arguments: arguments of ``train`` that could not be saved; others override those of the run. Saved arguments
            are restored, except for those that write, publish or report somewhere, which are listed in the result's
            ``notes``, and for a number of processes that this machine does not have. The training runs in the
            foreground. A run that had finished takes none.

    Raises:
        AdapterError: several trainings are paused.
        CheckpointNotFoundError: there is no such run, or it has no checkpoint.
        BaseMismatchError: the model is not that of the run.
        ConfigError: an argument is unknown.
        TrainingError: the data differs from that of the run; an argument of the run has to be given again; arguments
            are given for a run that had finished or is paused, or they leave no step to train.
    """
    paused = paused_training(ctx, run, model)
    if paused is not None:
        given = {"data": data, "eval_data": eval_data, "tokenizer": tokenizer, **arguments}
        for name in (name for name, value in given.items() if value is not None):
            raise TrainingError(f"training {paused.state.adapter} is paused and continues as it is: leave out {name}=…")
        return lift_pause(paused)
    with ctx.deciding(), ctx.models.deciding():
        return _resume_kept(ctx, run, model, data, eval_data, tokenizer, variable, named_rows, arguments)


def _resume_kept(
    ctx: SessionContext,
    run: str | None,
    model: ModelLike,
    data: Any,
    eval_data: Any,
    tokenizer: Any,
    variable: str | None,
    named_rows: NamedRows | None,
    arguments: Mapping[str, Any],
) -> ResumeResult:
    """Resume a run from its last checkpoint; see ``resume``."""
    from nbpeft.runs.store import RunPlace
    from nbpeft.training.disk.checkpoints import last_whole
    from nbpeft.training.disk.kept_arguments import to_take_over
    from nbpeft.training.request import TrainRequest

    record, facts = kept_run(ctx, run)
    saved, left_out = to_take_over(facts.get("arguments"))
    if record.is_complete:
        _refuse_given(record, arguments)
        note = _unused_note(data=data, eval_data=eval_data, tokenizer=tokenizer)
    else:
        _check_given(record, facts, left_out, data, arguments)
        note = _not_restored_note(facts, left_out, arguments)
    given = {**saved, **arguments}
    held_out = given.pop("eval_data", None)
    eval_data = held_out if eval_data is None else eval_data
    target = record.model if model is None else model
    base = uncompiled(target) if is_module(target) else None
    tracked = ctx.find(target, variable) if base is not None or target in ctx.models.names else ctx.models.get(model)
    state = last_whole(Path(record.path), strict=True)
    step = int(state.name.rpartition("-")[2])
    members = _kept_members(state)
    names = tuple(members or record.adapters)
    given |= {"members": members} if members else {}
    places = _adapter_folders(record, state, names)
    under: Any = tracked.manager.model if tracked is not None else base
    for place in places.values():
        _check_base(record, place, under)
    with ctx.command(f"resuming {record.name}", slow=True), _undone_unless_learned(ctx, under):
        back, present = _restore_adapters(ctx, record, target if tracked is None else tracked.model, places, variable)
        tracked = ctx.models.get(back)
        origin = facts.get("origin")
        if isinstance(origin, str) and origin:
            tracked.set_origin(names, origin)
        result = None
        if not record.is_complete:
            request = TrainRequest.of(
                tracked.model,
                data,
                eval_data,
                tokenizer=tokenizer,
                adapter=names[0] if len(names) == 1 else None,
                run_dir=RunPlace(_store(ctx), record.name, record.model),
                resume_from_checkpoint=str(state),
                **given,
            )
            result = train_tracked(ctx, tracked, request, replaced=present, named_rows=named_rows)
        ctx.changed = True
        reference = ModelRef(tracked.model, rehandle(tracked.manager.model))
        return ResumeResult(reference, record.name, step, names, result, notes=(note,) if note else ())


def _kept_members(state: Path) -> dict[str, dict[str, Any]]:
    """Return the adapters of a sweep in a checkpoint, without those that were cloned after it."""
    from nbpeft.training.disk.checkpoints import read_errors
    from nbpeft.training.sweep.trainer import kept_members

    with read_errors(state):
        return kept_members(json.loads((state / "trainer_state.json").read_text(encoding="utf-8")))


def _adapter_folders(record: RunRecord, state: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the folders of a run's adapters in its last checkpoint, by their names."""
    from nbpeft.checkpoint import inside
    from nbpeft.training.disk.checkpoints import read_errors

    places = {name: state if name == DEFAULT_ADAPTER else state / name for name in names}
    with read_errors(state):
        missing = [name for name, place in places.items() if place != state and not inside.is_folder(state, name)]
    if missing:
        raise CheckpointNotFoundError(f"the last checkpoint of run {record.name} contains no adapter {few(missing)}")
    return places


def _restore_adapters(
    ctx: SessionContext, record: RunRecord, model: Any, places: Mapping[str, Path], variable: str | None
) -> tuple[Any, tuple[str, ...]]:
    """Load the adapters that the model lacks; return the model, and the names of the adapters that it already had."""
    from nbpeft.engine.tree.model_tree import manager_of
    from nbpeft.runs.record import words_of_run

    manager = manager_of(model)
    present = tuple(name for name in places if manager is not None and name in manager.configs)
    for name in present:
        assert manager is not None
        if record.is_complete:
            raise AdapterError(
                f"run {record.name} had finished, and {name!r} is on the model: delete or rename that one first "
                "to restore the run's adapter"
            )
        _check_config(record, name, manager.configs[name])
        tracked = ctx.find_adapted(model, variable)
        steps, last = tracked.steps_of((name,))
        if steps and (not last or last != record.id):
            trained = words_of_run(last, ctx.run_name(last))
            message = f"{name!r} was trained by {trained} since, and resuming run {record.name} would undo that"
            raise AdapterError(f"{message}: rename or delete it first")
    for name, place in places.items():
        if name not in present:
            model = load(ctx, place, name=name, model=model, variable=variable, trainable=True).model
    if len(places) > 1 or not present:  # training activates a single existing adapter
        ctx.models.get(model).manager.activate(list(places))
    return model, present


@contextmanager
def _undone_unless_learned(ctx: SessionContext, base: Any) -> Iterator[None]:
    """Remove loaded adapters and restore the active ones if the block fails before the first training step."""
    from nbpeft.engine.tree.model_tree import manager_of

    manager, known = manager_of(base), ctx.models.find(base)
    names, selected, enabled = (manager.names, manager.selected, manager.enabled) if manager else ((), (), True)
    steps, origins = ({}, []) if known is None else (dict(known.trained_steps), list(known.origins))
    try:
        yield
    except BaseException:
        tracked = ctx.models.find(base)
        if tracked is not None and tracked.trained_steps == steps:
            tracked.origins = origins
            with DeferredInterrupts(to_the_end=True):
                restore(tracked, names, selected, enabled=enabled)
        raise


def _refuse_given(record: RunRecord, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments for the training of a run that has nothing left to train."""
    from nbpeft.training.loop.checks import check_names

    if arguments:
        check_names(arguments)
        raise TrainingError(
            f"{', '.join(f'{name}=…' for name in arguments)} cannot be used: run {record.name} had finished and has no "
            "state to continue. Restore its adapter without arguments, then session.train trains further"
        )


def _check_given(
    record: RunRecord, facts: Mapping[str, Any], left_out: Mapping[str, Any], data: Any, arguments: Mapping[str, Any]
) -> None:
    from nbpeft.training.disk.kept_arguments import missing_for_losses

    adapters = adapters_with_rows(facts)
    words = f"data={{{', '.join(f'{name!r}: …' for name in adapters)}}}" if adapters else "data=…"
    if data is None:
        raise TrainingError(f"resuming run {record.name} needs its training data: pass {words}")
    if adapters and not isinstance(data, Mapping):
        raise TrainingError(f"run {record.name} trained each adapter on rows of its own: pass {words}")
    for why, names in (
        ("values that its folder does not store; pass them again", facts.get("objects") or ()),
        ("arguments that are not restored from its folder; pass them again", missing_for_losses(left_out)),
    ):
        missing = [name for name in names if name not in arguments]
        if missing:
            words = ", ".join(f"{shortened(name, 40)}=…" for name in missing[:5])
            raise TrainingError(f"run {record.name} was trained with {why}: {words}")


def _not_restored_note(facts: Mapping[str, Any], left_out: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return a note about arguments of the run that the resumed training does not have; empty if there are none."""
    names = [name for name in {**left_out, **dict.fromkeys(facts.get("secrets", ()))} if name not in given]
    return f"not restored from the folder of the run: {few(names, 6)}; pass them again to use them" if names else ""


def _unused_note(**given: Any) -> str:
    """Return a note about what only a training needs, for a run that has none left; empty if nothing was given."""
    names = [name for name, value in given.items() if value is not None]
    return f"not used, because nothing is left to train: {few(names, quoted=False)}" if names else ""


def _check_base(record: RunRecord, place: Path, base: Any) -> None:
    """Raise BaseMismatchError unless the adapter was trained on this base model."""
    from nbpeft.checkpoint import compare
    from nbpeft.checkpoint.tensor_file import WEIGHTS_NAME, read_metadata

    difference = compare(read_metadata(place / WEIGHTS_NAME), base)
    if difference is not None:
        raise BaseMismatchError(f"cannot resume {record.name} on this model: {difference}")


def _check_config(record: RunRecord, name: str, config: Any) -> None:
    """Raise AdapterError if the adapter with this name is not that of the run."""
    present = config.to_dict()
    for field in _SAME:
        then, now = record.settings.get(field), getattr(present.get(field), "value", present.get(field))
        if field in record.settings and then != now and not isinstance(then, list):  # a sweep has several
            raise AdapterError(
                f"{name!r} has {field}={now!r}, and in run {record.name} it had {then!r}: delete or rename it first"
            )


def _record(store: RunStore, name: str) -> RunRecord:
    from nbpeft.runs.record import UNREADABLE

    record = store.find(name).record()
    if record.status == UNREADABLE:
        raise _cannot_be_read(record)
    return record


def _store(ctx: SessionContext) -> RunStore:
    place = run_place(ctx)
    if place is None:
        raise CheckpointNotFoundError("saving runs is disabled (NBPEFT_RUNS or runs_folder)")
    return place.store
