"""Listing the methods, and converting an adapter of any method to a LoRA."""

from __future__ import annotations

import argparse

from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, session_command, subcommand
from nbpeft.magics.subcommands.planning import SIZES, settings_of
from nbpeft.session.results.methods import SORTS


@subcommand(
    "methods",
    "List the methods: the cost of each on a model, its features, and when to choose it.",
    argument("target", nargs="?", metavar="MODEL", completes="model", help="variable with the model"),
    *SIZES,
    argument(
        "--sort",
        metavar="ORDER",
        default="group",
        choices=SORTS,
        words=SORTS,
        help="group (the most used first), name, parameters, memory (to train), peak (with --batch-size)",
    ),
    fields="config",
    example="%lora methods model target_modules=all-linear --batch-size 4 --max-length 512",
)
def methods(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """List the methods."""
    names = notebook.model_names()
    variable = options.target or (names[0] if len(names) == 1 else None)
    model = None if variable is None else notebook.chosen(variable)
    return notebook.session.methods(model, options.fields, variable=variable, sort=options.sort, **settings_of(options))


def _rank_or_share(text: str) -> int | float:
    """Parse a rank such as ``16`` or a share such as ``0.9``."""
    try:
        return int(text) if text.isdecimal() and len(text) <= 9 else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a rank such as 16 or a share such as 0.9, not {text!r:.60}"
        ) from None


session_command(
    "convert",
    "Convert an adapter of any method to the closest LoRA, and report how much of its change is preserved.",
    argument("adapter", metavar="NAME", completes="adapter", help="the adapter"),
    argument(
        "--r",
        required=True,
        type=_rank_or_share,
        metavar="R",
        help="rank of the LoRA; or the share of the change to preserve in each layer, e.g. 0.9",
    ),
    argument("--name", metavar="NAME", help="name of the LoRA (default: NAME_lora)"),
    argument("--replace", action="store_true", help="replace an adapter of that name"),
    ON_MODEL,
    example="%lora convert orders --r 16",
)
