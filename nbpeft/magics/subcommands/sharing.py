"""Uploading adapters to the hub."""

from __future__ import annotations

import argparse

from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, subcommand


@subcommand(
    "push",
    "Upload an adapter to the hub, with a card. Its access token: HF_TOKEN, a login's, or a secret of Colab or Kaggle.",
    argument("repo", metavar="USER/NAME", help="the repository; made if need be"),
    argument("--name", "-n", metavar="NAME", completes="adapter", help="which adapter, where there are several"),
    argument("--private", action="store_true", help="make a new repository private"),
    argument("--message", metavar="TEXT", help="of the commit (default: Upload adapter)"),
    argument("--revision", metavar="BRANCH", help="a branch, made if need be (default: main)"),
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
    )
