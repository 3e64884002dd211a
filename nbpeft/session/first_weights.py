"""The weights that adapters began with, for ``reset`` and for a training that starts anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.session.undoable import Undoable

if TYPE_CHECKING:
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel


def draw_anew(ctx: SessionContext, tracked: TrackedModel, name: str, *, seed: int | None = None) -> None:
    """Gives an adapter the weights it was made with; one that was loaded gets new ones. ``undo`` brings the old back.

    Its config, its place, whether it is active and whether it trains stay as they are.

    Args:
        ctx: the session's.
        tracked: the model.
        name: the adapter.
        seed: of the numbers that are drawn where the first ones are not known; None draws the next ones.

    Raises:
        MergeError: it is merged.
    """
    from nbpeft.engine.changes.random_numbers import drawing_from

    manager = tracked.manager
    with manager.reading():
        config, scale, place = manager.configs[name], manager.scale(name), manager.names.index(name)
        requested = tracked.requested_fields(name)
    made, states = tracked.first_random.get(name, (None, None))
    first = states if made is config else seed
    with nullcontext() if first is None else drawing_from(first):
        put = manager.prepare(name, config, trainable=name not in manager.frozen, replace=True)
    with Undoable(ctx, tracked, name, "reset").change():
        put()
        manager.place(name, place)
        manager.set_scale(name, scale)
    if made is config:
        tracked.first_random[name] = (manager.configs[name], states)
    tracked.requested[name] = (manager.configs[name], requested)


@contextmanager
def weights_kept_unless(
    ctx: SessionContext, tracked: TrackedModel, names: Iterable[str], learned: Callable[[], bool]
) -> Iterator[None]:
    """Gives adapters back what they were when the block fails before anything was learned.

    Args:
        ctx: the session's.
        tracked: their model.
        names: those whose weights the block replaces.
        learned: whether a step was done.
    """
    from nbpeft.engine.runtime.snapshots import restore, snapshot

    manager = tracked.manager
    before, past = [snapshot(manager, name) for name in names], ctx.history.of(manager)
    known = (dict(tracked.requested), dict(tracked.first_random), dict(tracked.trained_steps))
    try:
        yield
    except BaseException:
        if not learned() and before:
            with HeldInterrupts(to_the_end=True), manager.transaction() as change:
                for kept in before:
                    restore(manager, kept)
                ctx.history.take_back(manager, past, change)
            tracked.requested, tracked.first_random, tracked.trained_steps = known
        raise
