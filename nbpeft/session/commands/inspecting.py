"""Inspecting how much an adapter changes each layer of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbpeft.errors import AdapterError, check_text
from nbpeft.session.results.inspecting import InspectResult

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.state import MemoryState


def inspect(
    ctx: SessionContext, name: str | None = None, *, model: ModelLike = None, intruders: bool = False
) -> InspectResult:
    """Measure how much an adapter changes the weights, layer by layer; nothing is changed.

    Args:
        name: name of the adapter; None for the active one, or the only one.
        model: an adapted model.
        intruders: also count intruder dimensions: strong directions of an adapted weight that the frozen one lacks.
            Needs two singular value decompositions of each weight: seconds to minutes each for a large model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterError: weights are merged, or there are several adapters and no name.
    """
    from nbpeft.model.analysis.inspection import inspect_adapter

    check_text("name", name, optional=True)
    tracked = ctx.models.get(model, command="inspect", adapters=(name,))
    manager = tracked.manager
    if name is None:
        candidates = manager.active if len(manager.active) == 1 else manager.names
        if not candidates:
            raise AdapterError(f"{tracked.name} has no adapter to inspect")
        if len(candidates) > 1:
            raise AdapterError(f"say which adapter to inspect: {', '.join(candidates)}")
        name = candidates[0]
    with ctx.command(f"inspecting {name!r}", slow=True) as notes:
        changes = inspect_adapter(manager, name, intruders=intruders)
        return InspectResult(tracked.name, name, changes, scale=manager.scale(name), notes=tuple(notes))


def measure(ctx: SessionContext, model: str | None = None) -> MemoryState:
    """Measure a model's memory without notifying subscribers; fast, takes no lock, and can be called from any thread.

    Args:
        model: name of an adapted model; None for the current one.

    Raises:
        AdapterError: there is no such model.
    """
    wanted = model if model is not None else ctx.state.current
    tracked = next((tracked for tracked in ctx.models.all() if tracked.name == wanted), None)
    if tracked is None:
        raise AdapterError(f"no adapted model is called {wanted!r:.60}")
    return tracked.measure()


def memory(ctx: SessionContext, model: ModelLike = None) -> MemoryState:
    """Measure a model's memory and include it in the session's state.

    Args:
        model: an adapted model.
    """
    tracked = ctx.models.get(model, command="memory")
    tracked.memory = tracked.measure()
    ctx.publish()
    return tracked.memory
