"""Training: with transformers' Trainer, in a custom loop, or as a script."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from nbpeft.errors import AdapterError, TrainingInterrupted, check_text
from nbpeft.session.background import BackgroundRun, BackgroundTraining
from nbpeft.session.checks import place_of
from nbpeft.session.commands.running import UNTRACKED, runs_by_name, start
from nbpeft.session.first_weights import reinitialize, weights_kept_unless
from nbpeft.session.results import ExportResult
from nbpeft.session.sweeps import plan_sweep, remove_former
from nbpeft.session.trained import training_call

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.runs.store import RunPlace
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.state import MemoryState, NamedRows, TrainState
    from nbpeft.training import Run, RunControl, TrainResult
    from nbpeft.training.request import TrainRequest

_ENDED = ("finished", "stopped", "failed")


def start_run(ctx: SessionContext, /, model: ModelLike = None, total_steps: int | None = None, **options: Any) -> Run:
    """Create a run for a custom training loop, displayed live by front ends.

    ::

        with session.start_run(model, total_steps=100) as run:
            for batch in loader:
                ...
                run.step(loss)

    Args:
        model: the model in training, with or without adapters.
        total_steps: number of planned optimizer steps, or None if unknown.
        **options: further arguments of ``Run``.
    """
    ctx.refuse_another_training()
    tracked = ctx.find(model, command="start_run")
    return _run(ctx, tracked, model if tracked is None else tracked.model, total_steps, **options)


@overload
def train(
    ctx: SessionContext,
    /,
    model: ModelLike,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    adapter: str | None = None,
    background: Literal[False] = False,
    **arguments: Any,
) -> TrainResult: ...


@overload
def train(
    ctx: SessionContext,
    /,
    model: ModelLike,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    adapter: str | None = None,
    background: bool,
    **arguments: Any,
) -> TrainResult | BackgroundRun: ...


def train(
    ctx: SessionContext,
    /,
    model: ModelLike,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    adapter: str | None = None,
    keep: bool = True,
    restart: bool = False,
    source: Mapping[str, str] | None = None,
    named_rows: NamedRows | None = None,
    background: bool = False,
    **arguments: Any,
) -> TrainResult | BackgroundRun:
    """Train the active adapters with transformers' Trainer; displayed live by front ends.

    Stop ends the training gracefully: the result has the status, and the model keeps what it learned. So does an
    interruption, which is then raised as ``TrainingInterrupted``, so that queued cells do not run. ``last_result`` is
    the result in both cases. The run is saved on disk during training (see ``runs`` and ``resume``).

    Args:
        model: an adapted model.
        data: a dataset, a list of dictionaries, a DataFrame, a file or the name of a dataset on the hub; see
            ``nbpeft.training.train``.
        eval_data: evaluation data in the same form; or how many rows of ``data`` to hold out, as a share (0.1) or a
            number (64).
        tokenizer: tokenizer for text data.
        columns: names of the columns, e.g. ``{"prompt": "question", "completion": "answer"}``.
        adapter: adapter to activate first; it remains active if a step was done.
        keep: whether to save the run on disk: its settings and curve, the adapter and the training state.
        restart: start from the adapter's initial weights instead of its current ones; the adapters of a sweep start
            from the initial weights of the adapter that it names, which itself is not changed.
        source: source text of the call, saved with the run to repeat it.
        named_rows: rows to score the adapter on, as the call names them, for the card's next steps.
        background: return when the first step begins, and train in a thread. Between two steps the model can be called
            in evaluation mode and without gradients; changing its adapters raises ``BusyError``.
        **arguments: fields of ``TrainingArguments`` and further arguments of ``nbpeft.training.train``.

    Raises:
        TrainingError: the run cannot start, e.g. because no adapter is trainable.
        TrainingInterrupted: an interruption ended the run.
    """
    from nbpeft.training.request import TrainRequest
    from nbpeft.training.sweep.rows import with_own_rows

    ctx.refuse_another_training()
    tracked = ctx.find_adapted(model, command="train", adapters=(adapter,))
    if keep:
        arguments.setdefault("run_dir", run_place(ctx, tracked.name, source))
    reading = {"tokenizer": tokenizer, "columns": columns}
    request = with_own_rows(TrainRequest.of(tracked.model, data, eval_data, **reading, adapter=adapter, **arguments))
    if not background:
        return train_tracked(ctx, tracked, request, restart=restart, named_rows=named_rows)

    def work(running: BackgroundTraining) -> TrainResult:
        controlled = replace(request, control=running.control)
        return train_tracked(ctx, tracked, controlled, restart=restart, named_rows=named_rows, in_background=True)

    return start(ctx, tracked, _names(tracked, request), work)


def train_tracked(
    ctx: SessionContext,
    tracked: TrackedModel,
    request: TrainRequest,
    *,
    restart: bool = False,
    replaced: tuple[str, ...] = (),
    named_rows: NamedRows | None = None,
    in_background: bool = False,
) -> TrainResult:
    """Train a model of the session in the current thread, and record the number of steps for its adapters.

    Args:
        tracked: the model.
        request: the arguments of the training.
        restart: start from the initial weights of the adapters.
        replaced: adapters whose weights the training replaces before its first step.
        named_rows: rows to score the adapter on, as a cell named them.
        in_background: the command that started this thread has ended, and other commands run meanwhile.
    """
    from nbpeft.training.loop.train import run_training

    interrupted: TrainingInterrupted | None = None
    description = f"training {_names(tracked, request)}"
    with nullcontext() if in_background else ctx.command(description, slow=True, gather=False):
        if not in_background:
            ctx.refuse_another_training()
        try:
            with _recorded(ctx, tracked, request, restart=restart, replaced=replaced, named_rows=named_rows) as opened:
                result = run_training(opened)
        except TrainingInterrupted as error:
            interrupted, result = error, error.result
        tracked.result = ctx.last_result = result
        if not in_background:
            ctx.background.pop(tracked, None)  # an earlier result from the background is outdated
            ctx.models.select(tracked)
    if interrupted is not None:
        raise interrupted.with_traceback(None)
    return result


def _names(tracked: TrackedModel, request: TrainRequest) -> str:
    """Return the names of the trained adapters, as text."""
    return str(request.adapter or ", ".join(request.own_rows or tracked.manager.active))


@contextmanager
def _recorded(
    ctx: SessionContext,
    tracked: TrackedModel,
    request: TrainRequest,
    *,
    restart: bool,
    replaced: tuple[str, ...],
    named_rows: NamedRows | None,
) -> Iterator[TrainRequest]:
    """Yield the opened request to train with, and record the steps of its runs with the adapters.

    Adapters that learned nothing get their previous weights back.
    """
    from nbpeft.runs.store import RunPlace
    from nbpeft.training.adapters.adapted_model import trained_names

    manager = tracked.manager
    plan = plan_sweep(tracked, request, restart=restart)
    request, adapter = plan.request, plan.request.adapter
    if plan.origin and isinstance(request.run_dir, RunPlace):
        request = replace(request, run_dir=replace(request.run_dir, origin=plan.origin))
    if adapter is not None:
        manager.require_available(adapter)
    chosen = (adapter,) if adapter else trained_names(tracked.model)
    names = plan.names or tuple(name for name in chosen if name in manager.configs)
    again = names if restart and not plan.origin else ()
    resumes = bool(request.arguments.get("resume_from_checkpoint"))
    made: list[Run] = []
    notes: list[str] = []

    def make_run(watched: nn.Module, total_steps: int | None, publish: object, **options: Any) -> Run:
        run = _run(ctx, tracked, watched, total_steps, **options)
        run.rows = named_rows or run.rows
        if not resumes:
            earlier = {name: plan.earlier_steps(tracked, name) for name in names}
            run.continue_from(earlier, {run_id: ctx.run_name(run_id) for _, run_id in earlier.values()})
        for note in notes:
            run.note(note)
        made.append(run)
        return run

    def learned() -> bool:
        return any(run.learned for run in made)

    opened = replace(request, run_factory=make_run).opened()
    try:
        kept = (*again, *plan.former(tracked), *replaced)
        if kept:  # they could not be restored later
            manager.refuse_merged("a sweep" if plan.origin else "weights are replaced")
        with weights_kept_unless(ctx, tracked, kept, learned, also_at_end=not resumes):
            notes += [_restarted(ctx, tracked, name, request.seed) for name in again]
            notes.append(remove_former(ctx, tracked, plan))
            yield opened
    finally:
        for run in made:
            run.finish("stopped")  # an interruption may have come before it ended
        if learned():
            if plan.origin:
                tracked.set_origin(plan.names, plan.origin)
            names = tracked.with_clones(names, made[-1].state.members)
            tracked.count_steps(names, made[-1])
            tracked.sweep = ()
            tracked.training_call = training_call(made[-1].run_id, request)


def _restarted(ctx: SessionContext, tracked: TrackedModel, name: str, seed: int) -> str:
    """Initialize an adapter again; return a note about it."""
    former = ctx.run_name(tracked.last_run(name))
    reinitialize(ctx, tracked, name, seed=seed)
    return f"restarts {name} from new weights" + (f"; run {former} has the former ones" * bool(former))


def run_place(ctx: SessionContext, model: str = "", source: Mapping[str, str] | None = None) -> RunPlace | None:
    """Return where this session saves runs; None if that is disabled.

    Args:
        model: name of the trained model.
        source: source text of the call.
    """
    from nbpeft.runs.store import RunPlace, RunStore

    place = ctx.runs_folder
    return None if place is None else RunPlace(RunStore(place), model=model, source=source or {})


def result(ctx: SessionContext, model: ModelLike = None, *, wait: bool = False) -> TrainResult:
    """Return the result of the last training of a model, in the background or not.

    Args:
        model: an adapted model.
        wait: whether to wait for the end of a training in the background; an interruption ends only the wait.

    Raises:
        AdapterError: the model was not trained in this session, or is still being trained, or is to be waited for
            while it is paused.
        Exception: the error with which the training failed.
    """
    tracked = ctx.models.get(model)
    training = ctx.background.get(tracked)
    if training is not None and not training.ended and wait and training.control.paused:
        raise AdapterError(f"{training.description} is paused: resume or stop it before waiting for its result")
    has_ended = training is not None and training.state is not None and training.state.status in _ENDED
    if training is not None and (wait or has_ended):
        training.join()  # also waits until its thread has stored the result
    if training is not None and not training.ended:
        raise AdapterError(f"{training.description} is still running: it has no result yet")
    if training is not None and training.error is not None:
        raise training.error
    if tracked.result is None:
        raise AdapterError(f"{tracked.name} was not trained in this session")
    return tracked.result


def export(
    ctx: SessionContext,
    /,
    path: str,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    base: str | None = None,
    model: ModelLike = None,
    replace: bool = False,
    **arguments: Any,
) -> ExportResult:
    """Write a script that trains an adapter like the active one on the same rows: ``uv run``, ``accelerate launch``.

    Args:
        path: path of the script; rows that exist only in the notebook are written next to it.
        data: as for ``train``.
        eval_data: as for ``train``.
        tokenizer: as for ``train``.
        base: folder or hub id from which the script loads the base model; by default that of this model.
        model: an adapted model.
        replace: overwrite an existing file that was not exported, or was changed since.
        **arguments: as for ``train``.

    Raises:
        CheckpointError: another file exists.
        ConfigError: an argument cannot be written into a script.
        TrainingError: it is unknown where to load the base model from, or the data cannot be read.
    """
    from nbpeft.runs.record import words_of_run
    from nbpeft.training import export_script

    tracked, place = ctx.models.get(model, command="export"), place_of(path, "export")
    with ctx.command(f"exporting to {place}", slow=True) as notes:
        written = {field for adapter in tracked.manager.active for field in tracked.written.get(adapter, ())}
        how = {"tokenizer": tokenizer, "base": base, "replace": replace, "written": written}
        files = export_script(tracked.model, place, data, eval_data, **how, **arguments)
        data_files = tuple(zip(map(str, files.data), files.row_counts, strict=True))
        config, steps, run = tracked.earlier_steps.get(files.adapter, (None, 0, ""))
        if steps and config is tracked.manager.configs.get(files.adapter):
            which = f"those after step {steps:,} of {words_of_run(run, ctx.run_name(run))}"
            notes.append(f"the script starts from new weights, and the training here from {which}")
        return ExportResult(str(files.script), files.adapter, data_files, notes=(*files.notes, *notes))


def control(ctx: SessionContext, model: str | None = None) -> RunControl | None:
    """Return the controls (Stop and Pause) of the run on a model, or None while none is running.

    Args:
        model: name of the model; None for the run that started last.
    """
    check_text("model", model, optional=True)
    runs = runs_by_name(ctx)
    run = runs.get(model if model is not None else next(reversed(runs), ""))
    return run.control if run is not None else None


def _run(
    ctx: SessionContext, tracked: TrackedModel | None, watched: Any, total_steps: int | None, **options: Any
) -> Run:
    """Create a run that publishes its states through the session."""
    from nbpeft.training import Run

    options.setdefault("memory", _measuring(watched))
    run = Run(watched, total_steps, publish=lambda state: _published(ctx, run, tracked, state), **options)
    run.spelled = ctx.spelled
    return run


def _published(ctx: SessionContext, run: Run, tracked: TrackedModel | None, state: TrainState) -> None:
    if tracked is not None:
        tracked.training = state
    if state.status in _ENDED:
        ctx.runs.pop(tracked, None)
        ctx.lock.release(run.run_id)
    elif ctx.runs.get(tracked) is not run:
        ctx.runs[tracked] = run
        in_background = ctx.training_in_background
        if in_background is not None and in_background.control is run.control:
            in_background.begun(run)  # its cell shows it
            ctx.publish()
            return
        name = UNTRACKED if tracked is None else tracked.name
        ctx.lock.reserve(run.run_id, f"training {state.adapter or name}", run)
        ctx.notes.extend(ctx.run_subscribers.notify(run, name))
    ctx.publish()


def _measuring(model: Any) -> Callable[[], MemoryState | None]:
    """Return a function that measures the memory of a model and its training; it references the model weakly."""
    from nbpeft.memory import Meter

    reference, meter = weakref.ref(model), Meter(model)
    return lambda: None if reference() is None else meter.read()
