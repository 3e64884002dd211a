"""Which adapters are active, their scale, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbpeft.session.checks import names_of

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.results import CommandResult


def use(ctx: SessionContext, names: str | Sequence[str], *, model: ModelLike = None) -> CommandResult:
    """Switch to one adapter, or to several whose deltas are added.

    Args:
        names: one name or several.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    chosen = names_of(names)
    tracked = ctx.models.get(model, command="use", adapters=chosen)
    with ctx.command(f"switching to {', '.join(chosen)}") as notes:
        tracked.manager.activate(list(chosen), enable=True)
        ctx.models.select(tracked)
        return ctx.result(tracked, f"{tracked.name} uses {', '.join(map(repr, dict.fromkeys(chosen)))}", notes)


def off(ctx: SessionContext, *, model: ModelLike = None) -> CommandResult:
    """Disable all adapters, until ``on`` or ``use``, so that only the base model computes."""
    tracked = ctx.models.get(model, command="off")
    with ctx.command("switching adapters off") as notes:
        tracked.manager.disable()
        return ctx.result(tracked, f"adapters of {tracked.name} are off; session.on() enables them again", notes)


def on(ctx: SessionContext, *, model: ModelLike = None) -> CommandResult:
    """Enable the selected adapters again."""
    tracked = ctx.models.get(model, command="on")
    with ctx.command("switching adapters on") as notes:
        tracked.manager.enable()
        return ctx.result(tracked, f"adapters of {tracked.name} are on: {', '.join(tracked.manager.active)}", notes)


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


def freeze(ctx: SessionContext, name: str, *, model: ModelLike = None) -> CommandResult:
    """Exclude an adapter from training."""
    tracked = ctx.models.get(model, command="freeze", adapters=(name,))
    with ctx.command(f"freezing {name!r}") as notes:
        tracked.manager.freeze(name)
        return ctx.result(tracked, f"froze {name!r}", notes)


def unfreeze(ctx: SessionContext, name: str, *, model: ModelLike = None) -> CommandResult:
    """Allow an adapter to be trained while it is active."""
    tracked = ctx.models.get(model, command="unfreeze", adapters=(name,))
    with ctx.command(f"unfreezing {name!r}") as notes:
        tracked.manager.unfreeze(name)
        return ctx.result(tracked, f"{name!r} is trained while it is active", notes)
