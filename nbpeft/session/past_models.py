"""Restoring the unsaved adapters of a model that no longer exists, or that no variable refers to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import AdapterError, AdapterExistsError, BaseMismatchError
from nbpeft.session.handles import is_module, rehandle, uncompiled
from nbpeft.session.history import PastModel, base_difference
from nbpeft.session.results import ModelRef, RestoreResult

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.runtime.snapshots import AdapterSnapshot
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel


def lost(ctx: SessionContext, variable: str | None, *, other: bool = True) -> PastModel | TrackedModel | None:
    """Returns the model whose adapters can be restored to a variable, because it is deleted or not in a variable.

    Args:
        ctx: context of the session.
        variable: name of the variable; None for any.
        other: if there is none for this variable, return the last model of another variable.
    """
    before = [tracked for tracked in ctx.models.all() if tracked.before and tracked.held]
    candidates: list[PastModel | TrackedModel] = [*before, *ctx.history.models]
    own = [model for model in candidates if model.variable == variable]
    return next(reversed(own or (candidates if other else [])), None)


def restore_lost(
    ctx: SessionContext,
    source: PastModel | TrackedModel,
    tracked: TrackedModel | None,
    model: ModelLike,
    variable: str | None,
) -> RestoreResult:
    """Adds the adapters of a lost model to another one, all or none.

    They are added to ``tracked``, or else to ``model``, by default the value of the variable that ``source`` had.

    Raises:
        AdapterError: there is no model to add them to.
        AdapterExistsError: it has other adapters with these names.
        BaseMismatchError: they were trained on another base model.
    """
    past = source if isinstance(source, PastModel) else ctx.variables.unsaved_of(source)
    names = [kept.name for kept in past.adapters]
    variable = variable or (past.variable if tracked is None else tracked.name)
    if tracked is None and not is_module(model):
        model = ctx.variables.module(past.variable)
        if model is None:
            where = f"load it again into {past.variable!r}, or name a model (model=…)"
            raise AdapterError(f"the base model of {past.words} is gone: {where}")
        tracked = ctx.find(model, variable)
    base = tracked.manager.model if tracked is not None else uncompiled(model)
    if tracked is not None:
        tracked.manager.refuse_merged(f"restoring {names[0]!r}")
        taken = next((name for name in names if name in tracked.manager.configs), None)
        if taken is not None:
            raise AdapterExistsError(f"{tracked.name} has another adapter {taken!r}: rename that one first", name=taken)
    _check_base(past, base, variable)
    with ctx.command(f"restoring {', '.join(names)}", slow=True) as notes:
        with _put_onto(base, past.adapters) as handle:
            tracked = tracked if tracked is not None else ctx.models.new(variable, handle)
            for attribute, known in past.remembered.items():
                getattr(tracked, attribute).update(known)
            result = _result(tracked, past, notes)
        ctx.models.select(tracked)
        ctx.changed = True
        if isinstance(source, PastModel):
            ctx.history.drop_model(source)
        else:
            source.unbind()
        return result


def _result(tracked: TrackedModel, past: PastModel, notes: list[str]) -> RestoreResult:
    several = len(past.adapters) > 1
    names = ", ".join(repr(kept.name) for kept in past.adapters)
    where = f"{'are' if several else 'is'} on {tracked.name}, as on the model before"
    line = f"{names} {where}; {'their' if several else 'its'} training is not saved"
    reference = ModelRef(tracked.model, rehandle(tracked.manager.model))
    return RestoreResult(reference, tracked.name, line, tracked.state(), notes=tuple(notes))


def _check_base(past: PastModel, base: nn.Module, name: str) -> None:
    """Refuses a base model that is not that of the adapters, if that is known."""
    why = base_difference(past.fingerprint, base)
    if why is not None:
        raise BaseMismatchError(
            f"{past.words} cannot be restored on {name!r}: {why}; load the base model again, and name it (model=…)"
        )


@contextmanager
def _put_onto(base: nn.Module, adapters: Sequence[AdapterSnapshot]) -> Iterator[Any]:
    """Adds adapters to a base model, and yields a new PeftModel if it has none; removes them again after an error."""
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.engine.runtime.snapshots import restore
    from nbpeft.engine.tree.model_tree import manager_of
    from nbpeft.model import PeftModel

    present = manager_of(base)
    manager = present or AdapterManager(base)
    with DeferredInterrupts(), manager.transaction():
        chosen = manager.selected
        for kept in adapters:
            restore(manager, kept)
        if chosen:
            manager.activate(chosen)
        owner = None if present is None else present.owner
        handle = PeftModel.for_task(adapters[0].config).over(base, manager) if owner is None else None
        yield handle
