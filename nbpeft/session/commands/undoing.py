"""Restoring deleted and replaced adapters, and resetting one to its initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbpeft.errors import AdapterError, AdapterExistsError, BusyError
from nbpeft.session.first_weights import reinitialize
from nbpeft.session.past_models import lost, restore_lost
from nbpeft.session.results import LineResult

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.history import PastAdapter, PastModel
    from nbpeft.session.registry import TrackedModel
    from nbpeft.session.results import CommandResult, RestoreResult


def undo(ctx: SessionContext, *, model: ModelLike = None, variable: str | None = None) -> CommandResult | RestoreResult:
    """Restore the adapter that was last deleted, reconfigured, reset, swapped or replaced, exactly as it was.

    A repeated call goes one change further back. The last 16 adapters of a model are stored in host memory, at most
    2 GiB, until the model is unloaded or the process ends. If there is none, and the model was unloaded, or the
    notebook variable referred to another model before, its trained and unsaved adapters are restored on the variable's
    current model.

    Args:
        model: an adapted model; or a bare one, to restore the adapters of a model that no longer exists.
        variable: name for a model that the session does not know yet.

    Raises:
        AdapterError: there is nothing to restore, or the replacement was trained and is not saved.
        AdapterExistsError: another adapter has the name now.
        BaseMismatchError: the adapters were trained on another base model.
        MergeError: adapters are merged.
    """
    ctx.variables.look()
    tracked, source = _what_to_undo(ctx, model, variable)
    if source is not None:
        return restore_lost(ctx, source, tracked, model, variable)
    assert tracked is not None
    return _undone(ctx, tracked)


def discard(ctx: SessionContext, model: str) -> LineResult:
    """Discard the unsaved adapters of a model that no longer exists; ``undo`` cannot restore them any more.

    Args:
        model: the model's name since it was lost, e.g. ``model (before)``.

    Raises:
        AdapterError: there is no such model.
    """
    past = ctx.history.model(model)
    if past is None:
        there = ", ".join(map(repr, ctx.history.model_names)) or "none"
        raise AdapterError(f"no deleted model is called {model!r:.60}; there is: {there}")
    ctx.history.drop_model(past)
    ctx.publish()
    return LineResult(f"discarded {past.words} of {past.name!r}")


def _what_to_undo(
    ctx: SessionContext, model: ModelLike, variable: str | None
) -> tuple[TrackedModel | None, PastModel | TrackedModel | None]:
    """Return the model to restore adapters on, if known, and the model that had them, if it is another one."""
    past = ctx.history.model(model) if isinstance(model, str) else None
    if past is not None:
        return None, past
    if model is None and (ctx.models.rebound or not ctx.models.choices) and (found := lost(ctx, None)) is not None:
        return None, found
    tracked = None if model is None and not ctx.models.names else ctx.find(model, variable, command="undo")
    if tracked is not None and (tracked.before or ctx.history.of(tracked.manager)):
        return tracked, None
    found = lost(ctx, variable) if tracked is None else lost(ctx, tracked.name, other=False)
    if found is None and not ctx.models.names:
        raise AdapterError("nothing to undo: no model has adapters, and no unsaved training is kept")
    return ctx.models.get(model, command="undo") if found is None else tracked, found


def _undone(ctx: SessionContext, tracked: TrackedModel) -> CommandResult:
    """Restore the adapter of a model that was last deleted or replaced."""
    from nbpeft.engine.runtime.snapshots import restore

    manager = tracked.manager
    _refuse_in_training(ctx, tracked, "undo anything")
    known = ctx.history.of(manager)
    if not known:
        ways = "".join(_before_training(ctx, tracked, name) for name in manager.active[:1])
        raise AdapterError(f"nothing to undo on {tracked.name}: no adapter of it was deleted or replaced{ways}")
    past = known[-1]
    kept, name = past.kept, past.kept.name
    with ctx.command(f"restoring {name!r}") as notes:
        with manager.transaction() as change:
            _refuse_taken(ctx, tracked, past)
            restore(manager, kept, in_place=past.in_place and name in manager.configs)
            ctx.history.drop_last(manager, change)
            change.keep_attributes(tracked, "requested")
            change.keep(tracked.combinations)
            change.keep(tracked.trained_steps)
            if past.trained is not None:
                tracked.trained_steps[name] = past.trained
            if past.requested is not None:
                tracked.requested[name] = past.requested
            if past.combination is not None:
                tracked.combinations[name] = past.combination
        state = "; its training is not saved" if kept.unsaved else ""
        return ctx.result(tracked, f"{name!r} is back, as it was before it was {past.did}{state}", notes)


def reset(ctx: SessionContext, name: str, *, model: ModelLike = None) -> CommandResult:
    """Reset an adapter to its initial weights; ``undo`` restores the current ones.

    An adapter that was loaded gets new weights, initialized from its config.

    Args:
        name: name of the adapter.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: it is merged.
        BusyError: the model is being trained.
    """
    tracked = ctx.find_adapted(model, command="reset", adapters=(name,))
    manager = tracked.manager
    manager.require(name)
    _refuse_in_training(ctx, tracked, "reset an adapter")
    with ctx.command(f"resetting {name!r}") as notes:
        reinitialize(ctx, tracked, name)
        notes.append("session.undo() restores the old ones")
        return ctx.result(tracked, f"reset {name!r}: its weights are initialized again", notes)


def _refuse_in_training(ctx: SessionContext, tracked: TrackedModel, what: str) -> None:
    """Refuse to change adapters whose parameters an optimizer has."""
    run = ctx.runs.get(tracked)
    if run is not None:
        raise BusyError(f"cannot {what} while {tracked.name} is training {run.adapter}; stop it first")


def _refuse_taken(ctx: SessionContext, tracked: TrackedModel, past: PastAdapter) -> None:
    """Refuse to replace an adapter without being asked to."""
    from nbpeft.engine.runtime.snapshots import has_weights

    name = past.kept.name
    present = tracked.manager.configs.get(name)
    if present is None:
        return
    if present is not past.successor:
        raise AdapterExistsError(
            f"{name!r} was {past.did}, and another adapter has the name now: rename that one first "
            f"(session.rename({name!r}, 'NEW')){_before_training(ctx, tracked, name)}",
            name=name,
        )
    if name in tracked.manager.unsaved and not has_weights(tracked.manager, name, past.kept.weights):
        raise AdapterError(
            f"{name!r} was trained since it was {past.did} and is not saved: save or rename it first "
            f"(session.rename({name!r}, 'NEW'))",
            name=name,
        )


def _before_training(ctx: SessionContext, tracked: TrackedModel, name: str) -> str:
    """Say how to get back the weights from before the last training, which ``undo`` does not restore."""
    config, step, run_id = tracked.earlier_steps.get(name, (None, 0, ""))
    if config is None or config is not tracked.manager.configs.get(name) or tracked.origin_of(name):
        return ""
    training = f"; to undo the training of {name!r}, session"
    if step:
        run = ctx.run_name(run_id)
        return f"{training}.delete({name!r}), then session.resume({run!r}) goes back to run {run}" if run else ""
    drawn, _ = tracked.first_random.get(name, (None, None))
    return f"{training}.reset({name!r}) restores its initial weights" if drawn is config else ""
