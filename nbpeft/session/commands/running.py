"""Trainings in the background, and requests to a running one: stop, pause, resume, clone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, AdapterExistsError, ConfigError, check_text
from nbpeft.session.background import BackgroundRun, BackgroundTraining
from nbpeft.session.handles import is_module, uncompiled
from nbpeft.session.results.training import RequestResult

if TYPE_CHECKING:
    from nbpeft.session.background import Work
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training import Run, TrainResult

UNTRACKED = "model"
"""Name for a model without adapters while a custom loop trains it."""
_WAYS = "session.stop() stops it, session.result() shows how it ended"


def start(ctx: SessionContext, tracked: TrackedModel, names: str, work: Work) -> BackgroundRun:
    """Start a training of a model in the background.

    Args:
        tracked: the model.
        names: names of the adapters, as text.
        work: runs the training; called in the new thread.

    Raises:
        BusyError: another training is running.
        NbpeftError: the training cannot begin.
    """
    from nbpeft.engine.changes.step_gate import StepGate

    description, state = f"training {names}", tracked.manager.active_state
    gate = StepGate(tracked.model, description)
    training = BackgroundTraining(description, gate)

    def working(running: BackgroundTraining) -> TrainResult:
        try:
            return work(running)
        finally:
            state.gate = None

    try:
        with ctx.command(description, gather=False):
            ctx.refuse_another_training()
            ctx.background[tracked], state.gate = training, gate
        training.start(working, lambda run: ctx.notes.extend(ctx.run_subscribers.notify(run, tracked.name)))
    except BaseException:  # a gate that is never released would block all other threads
        training.abandon()
        state.gate = None if state.gate is gate else state.gate
        raise
    ctx.models.select(tracked)
    return BackgroundRun(tracked.name, f"started training {names} in the background; {_WAYS}", training)


def stop(ctx: SessionContext, model: str | None = None, *, adapter: str | None = None) -> RequestResult:
    """Request a training to end after the current step; what was learned remains.

    Args:
        model: name of its model; may be left out if only one training is running.
        adapter: stop only this adapter of a sweep; the others continue.

    Raises:
        AdapterError: no training is running, or it does not train such an adapter.
    """
    run = _running(ctx, model, "stop")
    if adapter is not None:
        _check_learns(run, adapter)
        run.control.request_stop_of(adapter)
        return _requested(run, "stops after this step; the others continue", adapter)
    run.control.request_stop()
    return _requested(run, "stops after the current step")


def clone(
    ctx: SessionContext, adapter: str, /, name: str | None = None, *, model: str | None = None, **fields: Any
) -> RequestResult:
    """Request a training of a sweep to duplicate one of its adapters, with other settings for the copy.

    After the current step the new adapter gets a copy of the weights and the optimizer state. From then on both are
    trained side by side, each with its own settings; the schedule is that of the whole run.

    Args:
        adapter: an adapter that is being trained.
        name: name of the copy; by default derived from the adapter and the copy's own settings.
        model: see ``stop``.
        **fields: settings of the copy: ``learning_rate``, ``weight_decay``, …, and fields of the objective (``beta``).

    Raises:
        AdapterError: no training is running, it does not train such an adapter, or the name is taken.
        ConfigError: a field cannot be set per adapter, or its value is invalid.
    """
    from nbpeft.engine.config.adapter_names import check_name

    run = _running(ctx, model, "clone")
    _check_learns(run, adapter)
    if not fields:
        raise ConfigError("a clone needs settings of its own, e.g. learning_rate=1e-4")
    run.check_clone(adapter, fields)
    if name is not None:
        check_name(name)
        trained = next((known for known, other in list(ctx.runs.items()) if other is run), None)
        if trained is not None and name in trained.manager.configs:
            raise AdapterExistsError(f"an adapter {name!r} exists already; choose another name", name=name)
    run.control.request_clone_of(adapter, name, **fields)
    return _requested(run, f"is cloned after this step{f' as {name}' if name else ''}", adapter)


def pause(ctx: SessionContext, model: str | None = None) -> RequestResult:
    """Request a training to wait after the current step; ``resume`` continues it.

    Args:
        model: see ``stop``.

    Raises:
        AdapterError: no training is running.
    """
    run = _running(ctx, model, "pause")
    run.control.pause()
    return _requested(run, "pauses after the current step")


def paused_training(ctx: SessionContext, run: str | None, model: ModelLike) -> Run | None:
    """Return the paused training of a run and a model, where they are named; None if there is none.

    Raises:
        AdapterError: there are several.
    """
    check_text("run", run, optional=True)
    ctx.variables.look()
    wanted = getattr(ctx.models.find(uncompiled(model)), "name", "") if is_module(model) else model
    paused = {
        name: training
        for name, training in runs_by_name(ctx).items()
        if training.control.paused and wanted in (None, name) and run in (None, Path(training.folder).name)
    }
    if len(paused) > 1:
        raise AdapterError(f"several trainings are paused; name the model to resume: {', '.join(paused)}")
    return next(iter(paused.values()), None)


def lift_pause(training: Run) -> RequestResult:
    """Continue a paused training."""
    training.control.resume()
    return _requested(training, "continues")


def _check_learns(run: Run, adapter: str) -> None:
    """Raise AdapterError if an adapter is not currently trained in a sweep."""
    learning = [member.name for member in run.state.members if member.status == "training"]
    if adapter not in learning:
        there = f"; these are: {', '.join(learning)}" if learning else ": the running training is not a sweep"
        raise AdapterError(f"{adapter!r:.60} is not being trained in a sweep{there}")


def _running(ctx: SessionContext, model: str | None, command: str) -> Run:
    check_text("model", model, optional=True)
    ctx.variables.look()
    runs = runs_by_name(ctx)
    if model is None and len(runs) == 1:
        return next(iter(runs.values()))
    if model in runs:
        return runs[model]
    if model is None and runs:
        raise AdapterError(f"several trainings are running; name the model to {command}: {', '.join(runs)}")
    what = "no training is running" if model is None else f"no training of {model!r:.60} is running"
    others = f", but one of {', '.join(runs)}" if runs else f": there is nothing to {command}"
    raise AdapterError(what + others)


def runs_by_name(ctx: SessionContext) -> dict[str, Run]:
    """Return name of the model -> run, for the trainings that are running."""
    return {UNTRACKED if tracked is None else tracked.name: run for tracked, run in list(ctx.runs.items())}


def _requested(run: Run, what: str, adapter: str | None = None) -> RequestResult:
    state = run.state
    return RequestResult(state.adapter if adapter is None else adapter, what, state.step, state.total_steps)
