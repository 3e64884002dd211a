"""Sweeps in a session: adapters that a cell adds for several values, and which of them the next training trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import AdapterError, ConfigError, few
from nbpeft.session.first_weights import first_random, weights_kept_unless
from nbpeft.session.history import MOST_BYTES
from nbpeft.session.undoable import Undoable
from nbpeft.sweeps import MOST, combinations, names_of, of_config, swept

if TYPE_CHECKING:
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training.request import TrainRequest


def configs_of(config: Mapping[str, Any], stem: str) -> dict[str, dict[str, Any]]:
    """Returns the name of each adapter of a sweep, and its fields.

    Raises:
        ConfigError: a sweep asks for halving.
    """
    fields = swept(config)
    if halved := next((name for name, values in fields.items() if values.halving), None):
        raise ConfigError(f"{halved}: adapters are only added here; give halving=True to their training", field=halved)
    combined = list(combinations(fields))
    return {name: {**config, **values} for name, values in zip(names_of(stem, combined), combined, strict=True)}


@dataclass(frozen=True)
class SweepPlan:
    """What a training trains side by side.

    Attributes:
        request: the completed request.
        names: the adapters; empty for a training of the active ones.
        origin: the adapter from which a sweep starts; empty for adapters that the model has already.
        copies: whether they start as copies of it.
    """

    request: TrainRequest
    names: tuple[str, ...] = ()
    origin: str = ""
    copies: bool = False

    def former(self, tracked: TrackedModel) -> list[str]:
        """Returns the adapters of earlier sweeps from the same adapter that have these names; without frozen ones."""
        manager, origin = tracked.manager, self.origin
        made = [name for name in self.names if origin and tracked.origin_of(name) == origin]
        return [name for name in made if name in manager.configs and name not in manager.frozen]

    def earlier_steps(self, tracked: TrackedModel, name: str) -> tuple[int, str]:
        """Returns how many steps the initial weights of an adapter were trained, and the id of the last run."""
        if not self.origin:
            return tracked.steps_of((name,))
        return tracked.steps_of((self.origin,)) if self.copies else (0, "")


def plan_sweep(tracked: TrackedModel, request: TrainRequest, *, restart: bool = False) -> SweepPlan:
    """Returns which adapters a training trains side by side.

    A repeated cell starts from the same adapter as before, and not from the best of its sweep; and adapters that a cell
    added for several values of a config are trained together.

    Args:
        tracked: the model.
        request: the arguments of the training.
        restart: whether the adapters of a sweep start from the initial weights of the adapter, instead of its current
            ones. The adapter itself does not change.

    Raises:
        AdapterError: the adapter from which a repeated sweep starts is not on the model.
        ConfigError: a field of the training is a sweep, and the adapters already are a sweep.
    """
    from nbpeft.training.sweep.rows import with_own_rows

    request = with_own_rows(request)
    manager, fields, adapter = tracked.manager, swept(request.given), request.adapter
    active = manager.active
    group = tracked.sweep if set(active) <= set(tracked.sweep) <= set(manager.configs) else ()
    if adapter is None and group and request.members is None:
        if fields:
            name = next(iter(fields))
            raise ConfigError(
                f"{', '.join(group)} are a sweep already: name one of them to start from, or sweep all fields here",
                field=name,
            )
        request = replace(request, members={name: {} for name in group})
    if not fields or request.members is not None:
        members: Any = request.members
        return SweepPlan(request, tuple(members or ()))
    origin = adapter or (active[0] if len(active) == 1 else "")
    if adapter is None:
        origin = tracked.origin_of(origin) or origin
    if origin not in manager.configs:
        _refuse_lost_origin(tracked, origin)
        return SweepPlan(request)  # the training refuses it
    names = tuple(names_of(origin, combinations(fields)))
    copies = not restart and not of_config(manager.configs[origin], fields)
    first = first_random(tracked, origin, request.seed) if restart else None
    return SweepPlan(replace(request, adapter=origin, first_random=first), names, origin, copies)


def _refuse_lost_origin(tracked: TrackedModel, origin: str) -> None:
    """Refuses to sweep again from an adapter that the model lacks, as where only its sweep was resumed."""
    made = [name for name in tracked.manager.configs if tracked.origin_of(name) == origin]
    if made:
        chosen = next((name for name in tracked.manager.active if name in made), made[0])
        raise AdapterError(
            f"{origin!r}, from which the sweep of {few(made, MOST, quoted=False)} started, is not on the model: load "
            f"or add it again, or name the adapter to start from: adapter={chosen!r}"
        )


def remove_former(ctx: SessionContext, tracked: TrackedModel, plan: SweepPlan) -> str:
    """Removes adapters that an earlier sweep made from the same one, so that all start alike; ``undo`` restores them.

    Frozen ones, and others that happen to have such a name, remain: the training refuses them.

    Returns:
        What is replaced, for the user; empty if there are none.

    Raises:
        AdapterError: unsaved ones are larger than what ``undo`` can restore.
    """
    manager = tracked.manager
    former = plan.former(tracked)
    unsaved = [name for name in former if name in manager.unsaved]
    removed = [Undoable(ctx, tracked, name, "replaced") for name in former]
    if sum(past.kept.byte_count for past in removed if past.kept.name in unsaved) > MOST_BYTES:
        raise AdapterError(
            f"the sweep makes {few(unsaved)} anew, which were trained and not saved, and are too large for undo: save, "
            "rename or delete them first"
        )
    for past in removed:
        with past.change():
            manager.remove(past.kept.name)
    if not former:
        return ""
    runs = list(filter(None, map(ctx.run_name, dict.fromkeys(map(tracked.last_run, former)))))
    of_runs = f" of {'run' if len(runs) == 1 else 'runs'} {few(runs, quoted=False)}" if runs else ""
    state = ", trained and not saved: rename the new ones, then undo, to have them back" if unsaved else ""
    return f"replaces {few(former, MOST, quoted=False)}{of_runs}{state}"


@contextmanager
def all_or_none(ctx: SessionContext, model: Any) -> Iterator[None]:
    """Removes what the block has added to a model if it fails."""
    from nbpeft.engine.tree.model_tree import manager_of

    manager, tracked = manager_of(model), ctx.models.find(model)
    names, selected = (manager.names, manager.selected) if manager is not None else ((), ())
    done = False
    try:
        if tracked is None:
            yield
        else:
            with weights_kept_unless(ctx, tracked, names, lambda: done):
                yield
        done = True
    except BaseException:
        current = ctx.models.find(model)
        if current is not None:
            with DeferredInterrupts(to_the_end=True):
                restore(current, names, selected, enabled=current.manager.enabled)
        raise


def restore(tracked: TrackedModel, names: tuple[str, ...], selected: tuple[str, ...], *, enabled: bool) -> None:
    """Removes the adapters that are not in ``names`` from a model, and unloads it if there are none."""
    from nbpeft.engine.runtime.snapshots import undo_additions

    manager = tracked.manager
    if names:
        undo_additions(manager, set(manager.names).difference(names), selected, enabled=enabled)
    else:
        tracked.model.unload()
