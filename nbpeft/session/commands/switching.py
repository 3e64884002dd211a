"""Which adapters are active, their scale, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbpeft.errors import AdapterError, few
from nbpeft.names import BASE
from nbpeft.session.checks import names_of

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.results import CommandResult


def use(ctx: SessionContext, names: str | Sequence[str], *, model: ModelLike = None) -> CommandResult:
    """Switch to one adapter, to several whose deltas are added, or to the base model alone.

    Args:
        names: one name or several; ``base`` disables all adapters until others are used.
        model: an adapted model.

    Raises:
        AdapterError: ``base`` is named together with adapters.
        UnknownAdapterError: there is no such adapter.
    """
    chosen = names_of(names)
    if BASE in chosen:
        if others := [name for name in chosen if name != BASE]:
            raise AdapterError(f"{BASE} is the model without adapters: use it alone, not with {few(others)}")
        return _use_base(ctx, model)
    tracked = ctx.models.get(model, command="use", adapters=chosen)
    with ctx.command(f"switching to {', '.join(chosen)}") as notes:
        tracked.manager.activate(list(chosen), enable=True)
        ctx.models.select(tracked)
        return ctx.result(tracked, f"{tracked.name} uses {', '.join(map(repr, dict.fromkeys(chosen)))}", notes)


def _use_base(ctx: SessionContext, model: ModelLike) -> CommandResult:
    """Disable all adapters, so that only the base model computes."""
    tracked = ctx.models.get(model, command="use")
    selected = tracked.manager.selected
    again = repr(selected[0] if len(selected) == 1 else list(selected)) if selected else ""
    with ctx.command("switching adapters off") as notes:
        tracked.manager.disable()
        back = f"; session.use({again}) goes back" if selected else ""
        return ctx.result(tracked, f"{tracked.name} uses the base model alone{back}", notes)


def scale(ctx: SessionContext, name: str, factor: float, *, model: ModelLike = None) -> CommandResult:
    """Set the factor on an adapter's delta; 1 is the trained strength.

    Args:
        name: name of the adapter.
        factor: the factor.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    tracked = ctx.models.get(model, command="scale", adapters=(name,))
    with ctx.command(f"scaling {name!r}") as notes:
        tracked.manager.set_scale(name, factor)
        return ctx.result(tracked, f"{name!r} is scaled by {factor:g}", notes)


def freeze(ctx: SessionContext, name: str, *, off: bool = False, model: ModelLike = None) -> CommandResult:
    """Exclude an adapter from training.

    Args:
        name: name of the adapter.
        off: allow it to be trained again, while it is active.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    tracked = ctx.models.get(model, command="freeze", adapters=(name,))
    with ctx.command(f"{'unfreezing' if off else 'freezing'} {name!r}") as notes:
        if off:
            tracked.manager.unfreeze(name)
        else:
            tracked.manager.freeze(name)
        return ctx.result(tracked, f"{name!r} is trained while it is active" if off else f"froze {name!r}", notes)
