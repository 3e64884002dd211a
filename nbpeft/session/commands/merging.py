"""Merging adapters into the base weights, and taking all of them off."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.session.checks import names_of, place_of
from nbpeft.session.results import ModelRef, UnloadResult
from nbpeft.session.results.merging import MergedCopy

if TYPE_CHECKING:
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.results import CommandResult

_CALIBRATION_ROWS = 128


def merge(
    ctx: SessionContext,
    /,
    names: str | Sequence[str] | None = None,
    *,
    model: ModelLike = None,
    safe: bool = False,
    to: str | os.PathLike[str] | None = None,
    calibrate: Any = None,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    **copying: Any,
) -> CommandResult | MergedCopy:
    """Add adapters to the base weights, so that they cost nothing when the model runs.

    Args:
        names: None: the active ones.
        model: an adapted model.
        safe: refuse where a merged weight would not be finite.
        to: write a merged copy in full precision into this folder, and leave the model as it is.
        calibrate: rows of what was learned, in any form that ``train`` takes, of which the first 128 are looked at:
            4-bit and 8-bit weights are rounded so that the adapters' effect on them stays, see
            ``nbpeft.merge_calibrated``.
        tokenizer: for ``calibrate``, by default the one that the model was trained or asked with; with ``to`` it is
            saved beside the copy.
        columns: of ``calibrate``, as for ``train``.
        **copying: with ``to``: ``base``, ``dtype`` and ``max_shard_bytes`` of ``nbpeft.merge_to_folder``.

    Raises:
        MergeError: the weights cannot be merged into, or are merged already.
        CheckpointError: the folder cannot be written, or holds a model.
        TrainingError: the rows to calibrate by cannot be read.
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
    if to is not None and calibrate is not None:
        raise ConfigError("a copy in full precision is not rounded: leave calibrate out, or to")
    with ctx.command("merging", slow=True) as notes:
        if folder is not None:
            how = copying | ({} if tokenizer is None else {"tokenizer": tokenizer})
            return _write_copy(manager, tracked.name, folder, chosen, notes, safe=safe, **how)
        if calibrate is not None:
            said = _merge_calibrated(ctx, manager, chosen, calibrate, tokenizer, columns, safe=safe)
            return ctx.result(tracked, f"merged {', '.join(map(repr, manager.merged))} into {tracked.name}", said)
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
    lossy = any(
        layer.backend.name != "dense" and layer.backend.can_merge and not layer.is_quantization_aware(chosen)
        for layer in manager.layers.values()
    )
    if manager.merged or not chosen or not lossy:
        return ""
    left = "session.merge(to=…) keeps full precision, session.merge(calibrate=…) most of what it does"
    return f"{merge_errors(manager.model, chosen)}; {left}"


def _merge_calibrated(
    ctx: SessionContext,
    manager: AdapterManager,
    names: list[str] | None,
    rows: Any,
    tokenizer: Any,
    columns: Mapping[str, str] | None,
    *,
    safe: bool,
) -> list[str]:
    """Merges, and says what was not used of the rows and what rounding has left."""
    from nbpeft.model import merge_calibrated
    from nbpeft.training.loop.rows import first_rows

    reader = ctx.tokenizers.get(manager.model) if tokenizer is None else tokenizer
    first = first_rows(manager.model, rows, rows=_CALIBRATION_ROWS, tokenizer=reader, columns=columns, loss=False)
    left = merge_calibrated(manager.model, first.batches(labels=False), names, safe_merge=safe)
    return [*first.notes(loss=False), str(left)]


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
