"""Shipping an adapter: what an engine takes of it, and the files it loads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.session.checks import place_of
from nbpeft.session.results import ShipResult

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext


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
    overwrite: bool = False,
    dry_run: bool = False,
    model: ModelLike = None,
) -> ShipResult:
    """Write an adapter as an engine loads it, after saying whether the engine takes it. The model stays as it is.

    Args:
        name: the adapter; None where the model has only one.
        engine: ``vllm``, ``llama.cpp``, ``ollama``, ``transformers``, ``peft``, ``diffusers`` or ``kohya``.
        to: a folder that is not there yet; None for ``<adapter>-<engine>``.
        merged: merge the adapter into the base, and write that.
        quantize: how weights are stored: ``f32``, ``f16``, ``bf16`` or ``q8_0`` (GGUF alone); None for the usual type.
        base: name of the base model in Ollama, where the adapter goes beside it; without one it is merged.
        tokenizer: saved with a merged model; None for the one that the model was trained or asked with.
        overwrite: let the folder take the place of one that holds an earlier shipment.
        dry_run: say what would be written, and write nothing.
        model: an adapted model.

    Raises:
        AdapterError: the engine does not take the adapter, or there are several and none is named.
        ConfigError: an argument is impossible, or a package is missing.
        CheckpointError: the folder cannot be written, or is there already; then nothing is written.
    """
    folder = None if to is None else place_of(to, "ship")
    tracked = ctx.models.get(model, command="ship")
    manager = tracked.manager
    if name is not None and not isinstance(name, str):
        raise AdapterError(f"ship needs the name of an adapter, not {name!r:.60}")
    given = tokenizer if tokenizer is not None else ctx.tokenizers.get(manager.model)
    with ctx.command(f"shipping for {engine}", slow=True) as notes:
        from nbpeft.shipping import ship as write

        done = write(
            manager.model,
            name,
            engine=engine,
            to=folder,
            merged=merged,
            quantize=quantize,
            base=base,
            tokenizer=given,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        return ShipResult(tracked.name, done, (*done.notes, *notes))
