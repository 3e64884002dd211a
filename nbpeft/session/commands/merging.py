"""Merging adapters into the base weights, and unloading all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
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
    safe_merge: bool = False,
    to: str | os.PathLike[str] | None = None,
    calibrate: Any = None,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    **copying: Any,
) -> CommandResult | MergedCopy:
    """Merge adapters into the base weights, so that they need no time when the model runs.

    Args:
        names: names of the adapters; None for the active ones.
        model: an adapted model.
        safe_merge: raise an error if a merged weight would not be finite.
        to: write a merged full-precision copy into this folder instead of changing the model.
        calibrate: rows of the training data, in any form that ``train`` accepts, of which the first 128 are used: 4-bit
            and 8-bit weights are rounded so that the adapters' effect on these rows is preserved, see
            ``nbpeft.merge_calibrated``.
        tokenizer: tokenizer for ``calibrate``, by default the one last used with the model; with ``to`` it is saved
            with the copy.
        columns: columns of ``calibrate``, as for ``train``.
        **copying: with ``to``: ``base``, ``dtype``, ``max_shard_bytes`` and ``replace`` of ``nbpeft.merge_to_folder``.

    Raises:
        MergeError: the adapters cannot be merged, or are already merged.
        CheckpointError: the folder cannot be written, or already has a model.
        TrainingError: the rows for calibration cannot be read.
    """
    from nbpeft.model import merge_to_folder

    chosen = None if names is None else list(names_of(names))
    folder = None if to is None else place_of(to, "merge")
    tracked = ctx.models.get(model, command="merge", adapters=chosen or ())
    manager = tracked.manager
    if not (manager.active if chosen is None else chosen):
        which = "active" if chosen is None else "named"
        raise AdapterError(f"nothing to merge into {tracked.name}: no adapter is {which}")
    if to is None and copying:
        raise ConfigError(f"{next(iter(copying))!r} needs a folder to merge into (to=…)")
    if to is not None and calibrate is not None:
        raise ConfigError("to and calibrate exclude each other: a full-precision copy is not rounded")
    with ctx.command("merging", slow=True) as notes:
        if folder is not None:
            how = copying | ({} if tokenizer is None else {"tokenizer": tokenizer})
            written = merge_to_folder(manager.model, chosen, folder, safe_merge=safe_merge, **how)
            return MergedCopy(tracked.name, written, notes=tuple(notes))
        if calibrate is not None:
            notes = _merge_calibrated(ctx, manager, chosen, calibrate, tokenizer, columns, safe_merge=safe_merge)
        else:
            note = _requantizing_note(manager, chosen)
            manager.merge(chosen, safe=safe_merge)
            notes += [note] if note else []
        return ctx.result(tracked, f"merged {', '.join(map(repr, manager.merged))} into {tracked.name}", notes)


def unmerge(ctx: SessionContext, *, model: ModelLike = None) -> CommandResult:
    """Restore the base weights, bit for bit.

    Args:
        model: an adapted model.
    """
    tracked = ctx.models.get(model, command="unmerge")
    with ctx.command("unmerging", slow=True) as notes:
        merged = tracked.manager.merged
        if not merged:
            return ctx.result(tracked, f"nothing is merged into {tracked.name}; nothing changed", notes)
        tracked.manager.unmerge()
        return ctx.result(tracked, f"unmerged {', '.join(map(repr, merged))}: the base weights are back", notes)


def unload(
    ctx: SessionContext, *, merge: bool = False, model: ModelLike = None, safe_merge: bool = False
) -> UnloadResult:
    """Unload all adapters and remove the model from the session; its PeftModels are unusable afterwards.

    Merged adapters stay in the base weights; ``unmerge`` takes them out before. ``undo`` restores adapters that were
    trained and not saved, unless some were merged.

    Args:
        merge: merge the active adapters into the base weights first.
        model: an adapted model.
        safe_merge: with ``merge``, raise an error if a merged weight would not be finite.
    """
    tracked = ctx.models.get(model, command="unload")
    with ctx.command("unloading", slow=True) as notes:
        names = tracked.manager.names
        past = ctx.variables.unsaved_of(tracked)
        with DeferredInterrupts():
            merged = tracked.manager.active if merge else tracked.manager.merged
            base = tracked.manager.unload(merge=bool(merged), names=merged, safe=safe_merge)
            ctx.models.remove(tracked)
            if past.adapters and not merged:
                notes += [older.dropped_words for older in ctx.history.add_model(past)]
        if past.adapters:
            back = "" if merged else f"; session.undo() restores {'it' if len(past.adapters) == 1 else 'them'}"
            notes.append(f"trained and not saved: {past.words}{back}")
        return UnloadResult(ModelRef(base), tracked.name, names, merged, notes=tuple(notes))


def _requantizing_note(manager: AdapterManager, names: list[str] | None) -> str:
    """Return a note about the error of merging into quantized weights; empty if nothing is quantized."""
    from nbpeft.model import merge_errors

    chosen = tuple(manager.active if names is None else names)
    lossy = any(
        layer.backend.name != "dense" and layer.backend.can_merge and not layer.is_quantization_aware(chosen)
        for layer in manager.layers.values()
    )
    if manager.merged or not chosen or not lossy:
        return ""
    advice = "session.merge(to=…) keeps full precision, session.merge(calibrate=…) most of the adapter's effect"
    return f"{merge_errors(manager.model, chosen)}; {advice}"


def _merge_calibrated(
    ctx: SessionContext,
    manager: AdapterManager,
    names: list[str] | None,
    rows: Any,
    tokenizer: Any,
    columns: Mapping[str, str] | None,
    *,
    safe_merge: bool,
) -> list[str]:
    """Merge, and return notes about unused parts of the rows and the remaining error."""
    from nbpeft.model import merge_calibrated
    from nbpeft.training.loop.rows import first_rows

    reader = ctx.tokenizers.get(manager.model) if tokenizer is None else tokenizer
    first = first_rows(manager.model, rows, rows=_CALIBRATION_ROWS, tokenizer=reader, columns=columns, loss=False)
    left = merge_calibrated(manager.model, first.batches(labels=False), names, safe_merge=safe_merge)
    return [*first.notes(loss=False), str(left)]
