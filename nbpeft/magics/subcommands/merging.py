"""Merging adapters into the base weights and taking them off."""

from __future__ import annotations

import argparse
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import COLUMNS, ON_MODEL, TOKENIZER, session_command, subcommand
from nbpeft.names import DTYPES

_SAFE = argument("--safe", action="store_true", help="refuse where a merged weight would not be finite")


@subcommand(
    "merge",
    "Add adapters to the base weights, so that they cost nothing when the model runs.",
    argument("names", nargs="*", metavar="NAME", completes="adapter", help="the active ones if left out"),
    _SAFE,
    argument(
        "--to", metavar="DIR", completes="path", help="write a merged copy in full precision; the model stays as it is"
    ),
    argument("--dtype", metavar="DTYPE", words=DTYPES, help="with --to: of its weights; the model's if left out"),
    argument("--base", metavar="DIR", completes="path", help="with --to: add to the original weights in this folder"),
    argument(
        "--calibrate",
        metavar="ROWS",
        completes="variable",
        help="rows of what was learned: 4-bit and 8-bit weights are rounded so that it stays",
    ),
    COLUMNS,
    TOKENIZER,
    ON_MODEL,
    example="%lora merge sql --to merged/sql",
)
def merge(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Merge adapters into the model, or into a copy of it on disk."""
    given: dict[str, Any] = {name: value for name in ("dtype", "base") if (value := getattr(options, name)) is not None}
    if options.to is None and given:
        raise CellError(f"%lora merge: --{next(iter(given))} goes with --to DIR")
    if options.to is None and options.calibrate is None and options.tokenizer is not None:
        raise CellError("%lora merge: --tokenizer goes with --to DIR or --calibrate ROWS")
    if options.columns is not None and options.calibrate is None:
        raise CellError("%lora merge: --columns goes with --calibrate ROWS")
    if options.calibrate is not None:
        given["calibrate"] = notebook.data(options.calibrate, "--calibrate")
        given["columns"] = None if options.columns is None else dict(options.columns)
    if options.to is not None or options.calibrate is not None:
        given["tokenizer"] = notebook.tokenizer(options.tokenizer)
    model = notebook.chosen(options.model)
    return notebook.session.merge(options.names or None, model=model, safe=options.safe, to=options.to, **given)


session_command("unmerge", "Put the base weights back, bit for bit.", ON_MODEL)


@subcommand(
    "unload",
    "Take all adapters off: the variable holds the base model again.",
    argument("--merge", action="store_true", help="add the active adapters to the base weights first"),
    _SAFE,
    ON_MODEL,
    example="%lora unload",
)
def unload(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Unload; no variable, output or traceback keeps the adapters alive afterwards."""
    chosen = notebook.chosen(options.model)
    if chosen in notebook.session.past_names:
        return notebook.session.discard(chosen)
    handle = notebook.session.model(chosen, command="unload")
    result = notebook.session.unload(merge=options.merge, model=handle, safe=options.safe)
    notebook.replace(handle, result.base)
    result.release()
    notebook.forget(handle)
    return result
