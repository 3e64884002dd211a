"""Sharing adapters: uploading them to the hub, and writing them for the programs that serve them."""

from __future__ import annotations

import argparse

from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, TOKENIZER, subcommand
from nbpeft.names import SERVING_ENGINES, STORED_TYPES


@subcommand(
    "push",
    "Upload an adapter to the hub, with a card. Its access token: HF_TOKEN, a login's, or a secret of Colab or Kaggle.",
    argument("repo", metavar="USER/NAME", help="the repository; made if need be"),
    argument("--name", "-n", metavar="NAME", completes="adapter", help="which adapter, where there are several"),
    argument("--private", action="store_true", help="make a new repository private"),
    argument("--message", metavar="TEXT", help="of the commit (default: Upload adapter)"),
    argument("--revision", metavar="BRANCH", help="a branch, made if need be (default: main)"),
    argument("--replace", action="store_true", help="upload over another adapter in that repository"),
    ON_MODEL,
    example="%lora push user/sql-adapter --private",
)
def push(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Upload one adapter."""
    return notebook.session.push(
        options.repo,
        name=options.name,
        model=notebook.chosen(options.model),
        private=True if options.private else None,
        message=options.message,
        revision=options.revision,
        replace=options.replace,
    )


@subcommand(
    "ship",
    "Write an adapter as a program that serves models loads it, after saying whether it takes it.",
    argument("name", nargs="?", metavar="NAME", completes="adapter", help="the adapter, where there are several"),
    argument(
        "--for",
        dest="engine",
        required=True,
        metavar="ENGINE",
        words=SERVING_ENGINES,
        help=f"one of {', '.join(SERVING_ENGINES)}",
    ),
    argument("--to", metavar="DIR", completes="path", help="a new folder (default: NAME-ENGINE)"),
    argument("--merged", action="store_true", help="merge it into the base, and write that"),
    argument(
        "--quantize",
        metavar="TYPE",
        words=STORED_TYPES,
        help="how weights are stored: f32, f16, bf16, or q8_0 in GGUF files (default: the engine's usual)",
    ),
    argument("--base", metavar="NAME", help="for ollama: the base model's name there, to put the adapter beside it"),
    argument("--overwrite", action="store_true", help="replace an earlier shipment in that folder"),
    argument("--dry-run", action="store_true", help="say what would be written, and write nothing"),
    TOKENIZER,
    ON_MODEL,
    example="%lora ship sql --for vllm --to served/sql",
)
def ship(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Write one adapter for an engine."""
    whole = options.merged or options.engine == "ollama"
    return notebook.session.ship(
        options.name,
        engine=options.engine,
        to=options.to,
        merged=options.merged,
        quantize=options.quantize,
        base=options.base,
        tokenizer=notebook.tokenizer(options.tokenizer) if whole or options.tokenizer else None,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
        model=notebook.chosen(options.model),
    )
