"""Shipping an adapter: whether a serving engine supports it, and writing the files that it loads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.session.checks import place_of
from nbpeft.session.init_rows import InitRows
from nbpeft.session.results import ShipResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nbpeft.session.context import ModelLike, SessionContext


@dataclass(frozen=True)
class _Calibration:
    """Rows that are read when the model is run on them: not before everything else has been checked."""

    ctx: SessionContext
    model: nn.Module
    rows: InitRows
    notes: list[str]

    def batches(self, size: int, *, labels: bool) -> list[dict[str, Tensor]]:
        """Returns the rows in batches; see ``FirstRows``."""
        read = self.rows.read(self.ctx, self.model, loss=False)
        self.notes.extend(read.notes(loss=False))
        found: list[dict[str, Tensor]] = read.batches(size, labels=labels)
        return found


def ship(
    ctx: SessionContext,
    name: str | None = None,
    *,
    engine: str,
    to: str | os.PathLike[str] | None = None,
    merged: bool = False,
    quantize: str | None = None,
    base: str | None = None,
    tokenizer: Any = None,
    calibrate: Any = None,
    replace: bool = False,
    dry_run: bool = False,
    model: ModelLike = None,
) -> ShipResult:
    """Write an adapter in the form that a serving engine loads, if the engine supports it. The model is not changed.

    Args:
        name: name of the adapter; None if the model has only one.
        engine: ``vllm``, ``llama.cpp``, ``ollama``, ``transformers``, ``peft``, ``diffusers`` or ``kohya``.
        to: a folder that does not exist yet; None for ``<adapter>-<engine>``.
        merged: merge the adapter into the base, and write the merged model.
        quantize: storage type of the weights: ``f32``, ``f16`` or ``bf16``, and in GGUF files ``q8_0``, of whole models
            also ``q6_k``, ``q5_k_m`` or ``q4_k_m``; None for the default.
        base: name of the base model in Ollama, to which the adapter is added; without it the adapter is merged.
        tokenizer: tokenizer to save with a merged model; None for the one last used with the model.
        calibrate: rows in any form that ``train`` accepts, for whole models in ``q4_k_m``, ``q5_k_m`` or ``q6_k``: the
            model is run on the first 256, and errors in inputs that are large there become smaller.
        replace: replace a folder that has an earlier shipment.
        dry_run: report what would be written, and write nothing.
        model: an adapted model.

    Raises:
        AdapterError: the engine does not support the adapter, or there are several adapters and no name.
        ConfigError: an argument is invalid, or a package is missing.
        CheckpointError: the folder cannot be written, or already exists; then nothing is written.
    """
    folder = None if to is None else place_of(to, "ship")
    if name is not None and not isinstance(name, str):
        raise AdapterError(f"ship needs the name of an adapter, not {name!r:.60}")
    tracked = ctx.models.get(model, command="ship", adapters=(name,))
    manager = tracked.manager
    given = tokenizer if tokenizer is not None else ctx.tokenizers.get(manager.model)
    with ctx.command(f"shipping for {engine}", slow=True) as notes:
        from nbpeft.shipping import ship as write

        rows = InitRows.of(calibrate, None, given, None, None) if calibrate is not None else None
        done = write(
            manager.model,
            name,
            engine=engine,
            to=folder,
            merged=merged,
            quantize=quantize,
            base=base,
            tokenizer=given,
            calibrate=None if rows is None else _Calibration(ctx, manager.model, rows, notes),
            replace=replace,
            dry_run=dry_run,
        )
        return ShipResult(tracked.name, done, notes=(*done.notes, *notes))
