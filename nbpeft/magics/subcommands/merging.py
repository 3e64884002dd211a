"""Merging adapters into the base weights, and unloading them."""

from __future__ import annotations

import argparse
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import COLUMNS, ON_MODEL, TOKENIZER, session_command, subcommand
from nbpeft.names import DTYPES


@subcommand(
    "merge",
    "Merge adapters into the base weights, so that they add no cost to inference.",
    argument(
        "names", nargs="*", metavar="NAME", completes="adapter", help="adapters to merge (default: the active ones)"
    ),
    argument(
        "--to", metavar="DIR", completes="path", help="write a merged copy in full precision; the model does not change"
    ),
    argument(
        "--dtype", metavar="DTYPE", words=DTYPES, help="with --to: data type of the weights (default: the model's)"
    ),
    argument("--replace", action="store_true", default=None, help="with --to: replace the files in that folder"),
    argument("--base", metavar="DIR", completes="path", help="with --to: add to the original weights in this folder"),
    argument(
        "--calibrate",
        metavar="DATA",
        completes="variable",
        help="rows like those of the training: 4-bit and 8-bit weights are rounded to preserve the outputs on them",
    ),
    COLUMNS,
    TOKENIZER,
    ON_MODEL,
    example="%lora merge sql --to merged/sql",
)
def merge(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Merge adapters into the model, or write a merged copy to disk."""
    keywords: dict[str, Any] = {
        name: value for name in ("dtype", "base", "replace") if (value := getattr(options, name)) is not None
    }
    if options.to is None and keywords:
        raise CellError(f"%lora merge: --{next(iter(keywords))} requires --to DIR")
    if options.to is None and options.calibrate is None and options.tokenizer is not None:
        raise CellError("%lora merge: --tokenizer requires --to DIR or --calibrate DATA")
    if options.columns is not None and options.calibrate is None:
        raise CellError("%lora merge: --columns requires --calibrate DATA")
    if options.calibrate is not None:
        keywords["calibrate"] = notebook.data(options.calibrate, "--calibrate")
        keywords["columns"] = options.columns
    if options.to is not None or options.calibrate is not None:
        keywords["tokenizer"] = notebook.tokenizer(options.tokenizer)
    model = notebook.chosen(options.model)
    return notebook.session.merge(options.names or None, model=model, to=options.to, **keywords)


session_command("unmerge", "Restore the base weights, bit for bit.", ON_MODEL)


@subcommand(
    "unload",
    "Remove all adapters: the variable refers to the base model again. Merged adapters stay in its weights.",
    ON_MODEL,
    example="%lora unload",
)
def unload(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Unload; afterwards no variable, output or traceback keeps the adapters alive."""
    chosen = notebook.chosen(options.model)
    if chosen in notebook.session.past_names:
        return notebook.session.discard(chosen)
    handle = notebook.session.model(chosen, command="unload")
    result = notebook.session.unload(model=handle)
    notebook.replace(handle, result.base)
    result.release()
    notebook.forget(handle)
    return result
