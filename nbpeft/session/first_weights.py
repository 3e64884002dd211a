"""The initial weights of adapters, for ``reset`` and for trainings that restart from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.session.undoable import Undoable

if TYPE_CHECKING:
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel


def reinitialize(ctx: SessionContext, tracked: TrackedModel, name: str, *, seed: int | None = None) -> None:
    """Resets an adapter to its initial weights; a loaded adapter gets new ones. ``undo`` restores the old weights.

    Its config, its position, whether it is active and whether it is trainable do not change.

    Args:
        ctx: context of the session.
        tracked: the model.
        name: name of the adapter.
        seed: seed of the random numbers if the initial ones are unknown; None uses the current random state.

    Raises:
        MergeError: the adapter is merged.
    """
    from nbpeft.checkpoint import set_prompt_format
    from nbpeft.engine.changes.random_numbers import drawing_from

    manager = tracked.manager
    with manager.reading():
        config, scale, place = manager.configs[name], manager.scale(name), manager.names.index(name)
        requested = tracked.requested_fields(name)
    first = first_random(tracked, name, seed)
    with nullcontext() if first is None else drawing_from(first):
        put = manager.prepare(name, config, trainable=name not in manager.frozen, replace=True)
    with Undoable(ctx, tracked, name, "reset").change():
        put()
        set_prompt_format(manager.configs[name], None)  # the new weights have learned from no rows
        manager.place(name, place)
        manager.set_scale(name, scale)
    if name in tracked.first_random and tracked.first_random[name][0] is config:
        tracked.first_random[name] = (manager.configs[name], first)
    tracked.requested[name] = (manager.configs[name], requested)


def first_random(tracked: TrackedModel, name: str, seed: int | None = None) -> Any:
    """Returns the random state, or the seed, from which the initial weights of an adapter are drawn.

    Args:
        tracked: its model.
        name: name of the adapter.
        seed: what to return if the state is unknown, as for a loaded adapter.
    """
    initial_config, states = tracked.first_random.get(name, (None, None))
    return states if initial_config is tracked.manager.configs[name] else seed


@contextmanager
def weights_kept_unless(
    ctx: SessionContext,
    tracked: TrackedModel,
    names: Iterable[str],
    learned: Callable[[], bool],
    *,
    also_at_end: bool = False,
) -> Iterator[None]:
    """Restores adapters if the block fails before anything was learned.

    Args:
        ctx: context of the session.
        tracked: their model.
        names: adapters whose weights the block replaces.
        learned: returns whether a training step was done.
        also_at_end: restore them as well if the block ends without an error and without a step.
    """
    from nbpeft.engine.runtime.snapshots import restore, snapshot

    manager = tracked.manager
    before, past = [snapshot(manager, name) for name in names], ctx.history.of(manager)
    known = (dict(tracked.requested), dict(tracked.first_random), dict(tracked.trained_steps))
    done = False
    try:
        yield
        done = not also_at_end
    finally:
        if not done and not learned() and before:
            with DeferredInterrupts(to_the_end=True), manager.transaction() as change:
                for adapter in before:
                    restore(manager, adapter)
                ctx.history.take_back(manager, past, change)
            tracked.requested, tracked.first_random, tracked.trained_steps = known
