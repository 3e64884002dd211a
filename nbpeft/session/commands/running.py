"""Trainings in the background: starting them, and what can be asked of one that runs: stop, pause, go on, clone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, AdapterExistsError, ConfigError
from nbpeft.session.background import BackgroundRun, BackgroundTraining
from nbpeft.session.results.requests import RequestResult
from nbpeft.sweeps import check_own

if TYPE_CHECKING:
    from nbpeft.session.background import Work
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training import Run, TrainResult

UNTRACKED = "model"
"""What a model without adapters is called while a loop of somebody's own trains it."""
_WAYS = "session.stop() ends it, session.result() shows what came of it"


def start(ctx: SessionContext, tracked: TrackedModel, names: str, work: Work) -> BackgroundRun:
    """Start a training of a model in the background.

    Args:
        ctx: of the session.
        tracked: the model.
        names: of the adapters.
        work: trains; runs in the thread.

    Raises:
        BusyError: something runs already.
        NbpeftError: it cannot begin.
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
    except BaseException:  # one that never began would keep all others out
        training.abandon()
        state.gate = None if state.gate is gate else state.gate
        raise
    ctx.models.select(tracked)
    return BackgroundRun(tracked.name, f"{names} trains in the background while other cells run; {_WAYS}", training)


def stop(ctx: SessionContext, model: str | None = None, *, adapter: str | None = None) -> RequestResult:
    """Ask a training to end after the step it is in; it keeps what was learned.

    Args:
        model: name of its model; may be left out where one training runs.
        adapter: stop this one of a sweep alone; the others go on.

    Raises:
        AdapterError: none runs, or no such adapter learns in it.
    """
    run = _running(ctx, model, "stop")
    if adapter is not None:
        _check_learns(run, adapter)
        run.control.request_stop_of(adapter)
        state = run.state
        return RequestResult(adapter, "learns no more after this step; the others go on", state.step, state.total_steps)
    run.control.request_stop()
    return _requested(run, "stops after the step it is in")


def clone(
    ctx: SessionContext, adapter: str, /, name: str | None = None, *, model: str | None = None, **fields: Any
) -> RequestResult:
    """Ask a training of a sweep to go on with one of its adapters as two, the second with other settings.

    After the step that runs the new adapter has the weights and the optimizer's state of the other one. From then on
    both learn side by side, each by its own settings; the schedule is that of the whole run.

    Args:
        adapter: one that learns.
        name: of the new one; by default what it is cloned from and has of its own.
        model: as for ``stop``.
        **fields: what it has of its own: ``learning_rate``, ``weight_decay``, …; see ``sweep``.

    Raises:
        AdapterError: none runs, no such adapter learns in it, or the name is taken.
        ConfigError: a field cannot be an adapter's own, or has a value that is impossible.
    """
    from transformers import TrainingArguments

    from nbpeft.engine.config.adapter_names import check_name
    from nbpeft.training.transformers.arguments import check_values

    run = _running(ctx, model, "clone")
    _check_learns(run, adapter)
    if not fields:
        raise ConfigError("a clone has other settings: say which, e.g. learning_rate=1e-4")
    check_own(fields)
    check_values(fields, TrainingArguments)
    if name is not None:
        check_name(name)
        trained = next((known for known, other in list(ctx.runs.items()) if other is run), None)
        if trained is not None and name in trained.manager.configs:
            raise AdapterExistsError(f"{name!r} is there already: take another name", name=name)
    run.control.request_clone_of(adapter, name, **fields)
    what, state = f"is cloned after this step{f' as {name}' if name else ''}", run.state
    return RequestResult(adapter, what, state.step, state.total_steps)


def pause(ctx: SessionContext, model: str | None = None) -> RequestResult:
    """Ask a training to wait after the step it is in; ``go_on`` lets it go on.

    Args:
        model: as for ``stop``.

    Raises:
        AdapterError: none runs.
    """
    run = _running(ctx, model, "pause")
    run.control.pause()
    return _requested(run, "pauses after the step it is in")


def go_on(ctx: SessionContext, model: str | None = None) -> RequestResult:
    """Let a training go on that waits.

    Args:
        model: as for ``stop``.

    Raises:
        AdapterError: none runs.
    """
    run = _running(ctx, model, "continue")
    run.control.resume()
    return _requested(run, "goes on")


def _check_learns(run: Run, adapter: str) -> None:
    """Refuses an adapter that does not learn beside others now."""
    learning = [member.name for member in run.state.members if member.status == "training"]
    if adapter not in learning:
        there = f"; {', '.join(learning)} do" if learning else ": the training that runs is no sweep"
        raise AdapterError(f"{adapter!r:.60} does not learn beside others now{there}")


def _running(ctx: SessionContext, model: str | None, command: str) -> Run:
    ctx.variables.look()
    runs = runs_by_name(ctx)
    if model is None and len(runs) == 1:
        return next(iter(runs.values()))
    if model in runs:
        return runs[model]
    if model is None and runs:
        raise AdapterError(f"several trainings run: say which model to {command}: {', '.join(runs)}")
    what = "no training runs" if model is None else f"no training of {model!r:.60} runs"
    raise AdapterError(what + (f"; there is one of {', '.join(runs)}" if runs else f": there is nothing to {command}"))


def runs_by_name(ctx: SessionContext) -> dict[str, Run]:
    """The runs that go on, by the names of their models."""
    return {UNTRACKED if tracked is None else tracked.name: run for tracked, run in list(ctx.runs.items())}


def _requested(run: Run, what: str) -> RequestResult:
    state = run.state
    return RequestResult(state.adapter, what, state.step, state.total_steps)
