"""Merging adapters into the base weights, and taking all of them off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, ConfigError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.session.checks import names_of, place_of
from nbpeft.session.results import ModelRef, UnloadResult
from nbpeft.session.results.merging import MergedCopy

if TYPE_CHECKING:
    from nbpeft.engine.manager import AdapterManager
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.results import CommandResult


def merge(
    ctx: SessionContext,
    /,
    names: str | Sequence[str] | None = None,
    *,
    model: ModelLike = None,
    safe: bool = False,
    to: str | os.PathLike[str] | None = None,
    **copying: Any,
) -> CommandResult | MergedCopy:
    """Add adapters to the base weights, so that they cost nothing when the model runs.

    Args:
        names: None: the active ones.
        model: an adapted model.
        safe: refuse where a merged weight would not be finite.
        to: write a merged copy in full precision into this folder, and leave the model as it is.
        **copying: with ``to``: ``base``, ``dtype``, ``tokenizer`` and ``max_shard_bytes`` of
            ``nbpeft.merge_to_folder``.

    Raises:
        MergeError: the weights cannot be merged into, or are merged already.
        CheckpointError: the folder cannot be written, or holds a model.
    """
    chosen = None if names is None else list(names_of(names))
    folder = None if to is None else place_of(to, "merge")
    tracked = ctx.models.get(model, command="merge")
    manager = tracked.manager
    if not (manager.active if chosen is None else chosen):
        which = "active" if chosen is None else "named"
        raise AdapterError(f"nothing to merge into {tracked.name}: no adapter is {which}")
    if to is None and copying:
        raise ConfigError(f"{next(iter(copying))!r} needs a folder to merge into (to=…)")
    with ctx.command("merging", slow=True) as notes:
        if folder is not None:
            return _write_copy(manager, tracked.name, folder, chosen, notes, safe=safe, **copying)
        note = _requantizing_note(manager, chosen)
        manager.merge(chosen, safe=safe)
        notes += [note] if note else []
        return ctx.result(tracked, f"merged {', '.join(map(repr, manager.merged))} into {tracked.name}", notes)


def unmerge(ctx: SessionContext, *, model: ModelLike = None) -> CommandResult:
    """Put the base weights back, bit for bit."""
    tracked = ctx.models.get(model, command="unmerge")
    with ctx.command("unmerging", slow=True) as notes:
        merged = tracked.manager.merged
        if not merged:
            return ctx.result(tracked, f"nothing is merged into {tracked.name}; nothing changed", notes)
        tracked.manager.unmerge()
        return ctx.result(tracked, f"unmerged {', '.join(map(repr, merged))}: the base weights are back", notes)


def unload(ctx: SessionContext, *, merge: bool = False, model: ModelLike = None, safe: bool = False) -> UnloadResult:
    """Take all adapters off and forget the model; its handles cannot be used afterwards.

    Args:
        merge: add the active adapters to the base weights first.
        model: an adapted model.
        safe: with ``merge``, refuse where a merged weight would not be finite.
    """
    tracked = ctx.models.get(model, command="unload")
    with ctx.command("unloading", slow=True) as notes:
        names = tracked.manager.names
        with HeldInterrupts():
            base = tracked.manager.unload(merge=merge, safe=safe)
            ctx.models.remove(tracked)
        return UnloadResult(ModelRef(base), tracked.name, names, merge, tuple(notes))


def _requantizing_note(manager: AdapterManager, names: list[str] | None) -> str:
    """What merging into quantized weights will cost, or the empty string where nothing is quantized."""
    from nbpeft.model import merge_errors

    chosen = tuple(manager.active if names is None else names)
    lossy = any(layer.backend.name != "dense" and layer.backend.can_merge for layer in manager.layers.values())
    if manager.merged or not chosen or not lossy:
        return ""
    return f"{merge_errors(manager.model, chosen)}; session.merge(to=…) keeps full precision"


def _write_copy(
    manager: Any, model_name: str, folder: str, names: list[str] | None, notes: list[str], **how: Any
) -> MergedCopy:
    """Writes the copy; see ``nbpeft.merge_to_folder`` for what ``how`` may hold."""
    from nbpeft.model import merge_to_folder

    done = merge_to_folder(manager.model, names, folder, **how)
    assert done.errors is not None
    return MergedCopy(
        model_name,
        done.names,
        str(done.folder),
        done.dtype,
        done.byte_count,
        done.shard_bytes,
        done.errors,
        tuple(notes),
    )
