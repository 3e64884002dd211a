"""Sweeps in a session: adapters that a cell adds for several values, and which of them the next training trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.errors import ConfigError
from nbpeft.sweeps import combinations, names_of, swept

if TYPE_CHECKING:
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training.request import TrainRequest


def configs_of(config: Mapping[str, Any], stem: str) -> dict[str, dict[str, Any]]:
    """Returns the name of each adapter of a sweep, and its fields.

    Args:
        config: fields, some of them with several values.
        stem: prefix of the names.

    Raises:
        ConfigError: a sweep says how the adapters are stopped.
    """
    fields = swept(config)
    if stopped := next((name for name, values in fields.items() if values.stop), None):
        raise ConfigError(f"{stopped}: adapters are only added here; give stop='half' to their training", field=stopped)
    combined = list(combinations(fields))
    return {name: {**config, **values} for name, values in zip(names_of(stem, combined), combined, strict=True)}


def plan_sweep(tracked: TrackedModel, request: TrainRequest) -> tuple[tuple[str, ...], TrainRequest]:
    """Returns the adapters that a training trains side by side (empty for a single one), and the completed request.

    A repeated cell starts from the same adapter as before, and not from the best of its sweep; and adapters that a cell
    added for several values of a config are trained together.

    Args:
        tracked: the model.
        request: the arguments of the training.

    Returns:
        The adapters, and the request to train them.

    Raises:
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
    if not fields:
        members: Any = request.members
        return tuple(members or ()), request
    if adapter is None and len(active) == 1 and tracked.origins.get(active[0]) in manager.configs:
        adapter = tracked.origins[active[0]]
        request = replace(request, adapter=adapter)
    stem = adapter or (active[0] if len(active) == 1 else "")
    names = names_of(stem, combinations(fields))
    tracked.origins |= {name: stem for name in names if stem}
    return tuple(names), request


@contextmanager
def all_or_none(ctx: SessionContext, model: Any) -> Iterator[None]:
    """Removes what the block has added to a model if it fails."""
    from nbpeft.engine.tree.model_tree import manager_of
    from nbpeft.session.first_weights import weights_kept_unless

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
            with HeldInterrupts(to_the_end=True):
                restore(current, names, selected, enabled=current.manager.enabled)
        raise


def restore(tracked: TrackedModel, names: tuple[str, ...], selected: tuple[str, ...], *, enabled: bool) -> None:
    """Removes the adapters that are not in ``names`` from a model, and unloads it if there are none.

    Args:
        tracked: the model.
        names: adapters to preserve.
        selected: adapters to activate.
        enabled: whether adapters are enabled afterwards.
    """
    from nbpeft.engine.runtime.snapshots import undo_additions

    manager = tracked.manager
    if names:
        undo_additions(manager, set(manager.names).difference(names), selected, enabled=enabled)
    else:
        tracked.model.unload()
