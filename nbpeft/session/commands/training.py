"""Training: with transformers' Trainer, in a loop of one's own, or as a script."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

from nbpeft.errors import AdapterError
from nbpeft.session.background import BackgroundRun, BackgroundTraining
from nbpeft.session.checks import place_of
from nbpeft.session.commands.running import start
from nbpeft.session.results import ExportResult

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.state import MemoryState, TrainState
    from nbpeft.training import Run, RunControl, TrainResult

_ENDED = ("finished", "stopped", "failed")


def track(ctx: SessionContext, /, model: ModelLike = None, total_steps: int | None = None, **options: Any) -> Run:
    """Make a run for a training loop of one's own, shown live where a front end listens.

    ::

        with session.track(model, total_steps=100) as run:
            for batch in loader:
                ...
                run.step(loss)

    Args:
        model: the model in training; one without adapters can be tracked too.
        total_steps: optimizer steps planned, or None where that is not known.
        **options: further arguments of ``Run``.
    """
    ctx.refuse_another_training()
    tracked = ctx.find(model)
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
    adapter: str | None = None,
    background: bool = False,
    **arguments: Any,
) -> TrainResult | BackgroundRun:
    """Train the active adapters with transformers' Trainer; shown live where a front end listens.

    Stop and KeyboardInterrupt end it gracefully: the result says so and the model keeps what
    it learned.

    Args:
        model: an adapted model.
        data: a dataset or a list of dictionaries; see ``nbpeft.training.train``.
        eval_data: the same, for evaluation.
        tokenizer: for data that is text.
        adapter: switch to this one first; it stays active when a step was done.
        background: return when the first step begins, and train in a thread. The model answers between two steps,
            in evaluation mode and without gradients; what would change its adapters raises ``BusyError``.
        **arguments: fields of ``TrainingArguments`` and further arguments of ``nbpeft.training.train``.

    Raises:
        TrainingError: the run cannot start, e.g. because no adapter can train.
    """
    from nbpeft.training import is_plain, train

    ctx.refuse_another_training()
    tracked = ctx.find_adapted(model, command="train")
    trained, names = tracked.model, adapter or ", ".join(tracked.manager.active)

    def work(in_background: BackgroundTraining | None = None) -> TrainResult:
        def make_run(watched: nn.Module, total_steps: int | None, publish: object, **options: Any) -> Run:
            return _run(ctx, tracked, watched, total_steps, memory=_measuring(trained), **options)

        given = {"tokenizer": tokenizer, "adapter": adapter, "run_factory": make_run}
        if in_background is not None:
            given["control"] = in_background.control
        result = ctx.results[tracked.name] = train(trained, data, eval_data, **arguments, **given)
        plain = is_plain(data)
        tracked.trained_on_plain_text = tracked.trained_on_plain_text if plain is None else plain
        return result

    if background:
        return start(ctx, tracked, names, work)
    with ctx.command(f"training {names}", slow=True, gather=False):
        result = work()
        ctx.models.select(tracked)
        return result


def result(ctx: SessionContext, model: ModelLike = None) -> TrainResult:
    """Return how the last training of a model ended, in the background or not.

    Args:
        model: an adapted model.

    Raises:
        AdapterError: it was not trained here, or still is.
        Exception: what the training failed with.
    """
    name = ctx.models.get(model).name
    training = ctx.background.get(name)
    if training is not None and training.state is not None and training.state.status in _ENDED:
        training.join()  # what it leaves is being put away
    if training is not None and not training.ended:
        raise AdapterError(f"{training.description} goes on: it has no result yet")
    if training is not None and training.error is not None:
        raise training.error
    if name not in ctx.results:
        raise AdapterError(f"{name} was not trained in this session")
    return ctx.results[name]


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
    **arguments: Any,
) -> ExportResult:
    """Write a script that trains an adapter like the active one on the same rows, for ``accelerate launch``.

    Args:
        path: of the script; the tokenised rows go beside it.
        data: as for ``train``.
        eval_data: as for ``train``.
        tokenizer: as for ``train``.
        base: where the script finds the base model; by default where this one came from.
        model: an adapted model.
        **arguments: as for ``train``.

    Raises:
        ConfigError: an argument cannot be written into a script.
        TrainingError: it is not known how to load the base model, or the data cannot be read.
    """
    from nbpeft.training import export_script

    tracked, place = ctx.models.get(model), place_of(path, "export")
    with ctx.command(f"exporting to {place}", slow=True) as notes:
        files = export_script(tracked.model, place, data, eval_data, tokenizer=tokenizer, base=base, **arguments)
        data_files = tuple(zip(map(str, files.data), files.row_counts, strict=True))
        return ExportResult(str(files.script), files.adapter, data_files, tuple(notes))


def control(ctx: SessionContext, model: str | None = None) -> RunControl | None:
    """Return Stop and Pause of the run on a model, or None while none runs."""
    name = model if model is not None else next(reversed(ctx.runs), "")
    run = ctx.runs.get(name)
    return run.control if run is not None else None


def _run(
    ctx: SessionContext, tracked: TrackedModel | None, watched: Any, total_steps: int | None, **options: Any
) -> Run:
    """Make a run that publishes its states through the session."""
    from nbpeft.training import Run

    options.setdefault("memory", _measuring(watched))
    run = Run(watched, total_steps, publish=lambda state: _published(ctx, run, tracked, state), **options)
    return run


def _published(ctx: SessionContext, run: Run, tracked: TrackedModel | None, state: TrainState) -> None:
    name = tracked.name if tracked is not None else "model"
    if tracked is not None:
        tracked.training = state
    if state.status in _ENDED:
        ctx.runs.pop(name, None)
        ctx.lock.release(run.run_id)
    elif ctx.runs.get(name) is not run:
        ctx.runs[name] = run
        in_background = ctx.training_in_background
        if in_background is not None and in_background.control is run.control:
            in_background.begun(run)  # its cell shows it
            ctx.publish()
            return
        ctx.lock.reserve(run.run_id, f"training {state.adapter or name}", run)
        ctx.notes.extend(ctx.run_subscribers.notify(run, name))
    ctx.publish()


def _measuring(model: Any) -> Callable[[], MemoryState | None]:
    """Return a function that measures a model's memory and holds it weakly."""
    from nbpeft.memory import measure

    reference = weakref.ref(model)

    def look() -> MemoryState | None:
        found = reference()
        return None if found is None else measure(found)

    return look
