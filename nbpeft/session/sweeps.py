"""Sweeps in a session: adapters that a cell makes for several values, and which of them the next training trains."""

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
    """What each adapter of a sweep is called, and its fields.

    Args:
        config: fields, some of them with several values.
        stem: what their names begin with.
    """
    combined = list(combinations(swept(config)))
    return {name: {**config, **values} for name, values in zip(names_of(stem, combined), combined, strict=True)}


def plan_sweep(tracked: TrackedModel, request: TrainRequest) -> tuple[tuple[str, ...], TrainRequest]:
    """The adapters that a training trains side by side; none where it is of one.

    Completes the request: a cell that is run again starts from the same adapter as before, and not from the best of
    its sweep; and adapters that a cell made for several values of a config are trained together.

    Args:
        tracked: the model.
        request: of the training.

    Returns:
        The adapters, and the request to train them.

    Raises:
        ConfigError: a field of the training is swept and the adapters are already.
    """
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
    """Takes off what the block has put on a model, where it fails."""
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
        found = ctx.models.find(model)
        if found is not None:
            with HeldInterrupts(to_the_end=True):
                restore(found, names, selected, enabled=found.manager.enabled)
        raise


def restore(tracked: TrackedModel, names: tuple[str, ...], selected: tuple[str, ...], *, enabled: bool) -> None:
    """Leaves a model with these adapters of those it has; one that had none is bare again."""
    manager = tracked.manager
    if not names:
        tracked.model.unload()
        return
    with manager.transaction():
        for name in set(manager.names).difference(names):
            manager.remove(name)
        if selected != manager.selected:
            manager.activate(selected)
        if not enabled:
            manager.disable()
