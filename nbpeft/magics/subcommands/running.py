"""Commands for a training in the background."""

from __future__ import annotations

import argparse

from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import refuse_fields, session_command, subcommand

_MODEL = argument(
    "target", nargs="?", metavar="MODEL", completes="model", help="the model; not needed if only one training runs"
)


session_command(
    "stop",
    "Stop a background training after the current step; progress is kept.",
    _MODEL,
    argument(
        "--adapter",
        "-a",
        metavar="NAME",
        completes="adapter",
        help="stop only this adapter of a sweep; the others continue",
    ),
    example="%lora stop",
)


@subcommand(
    "clone",
    "Fork an adapter of a sweep after the current step: the copy is trained too, with other settings.",
    argument("adapter", metavar="NAME", completes="adapter", help="the adapter, which continues unchanged"),
    argument("--name", metavar="NAME", help="name of the copy (default: derived from its new settings)"),
    argument(
        "--model", "-m", metavar="MODEL", completes="model", help="the model; not needed if only one training runs"
    ),
    fields="training",
    example="%lora clone sql-lr3e-4 --name sql-slow learning_rate=1e-4",
)
def clone(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Clone one adapter of a sweep."""
    refuse_fields(options, ("name", "model"))
    return notebook.session.clone(options.adapter, options.name, model=options.model, **options.fields)


session_command("pause", "Pause a background training after the current step.", _MODEL, example="%lora pause")
