"""Sharing adapters: uploading them to the Hub, and exporting them for inference engines."""

from __future__ import annotations

import argparse

from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, TOKENIZER, session_command, subcommand
from nbpeft.names import SERVING_ENGINES, STORED_TYPES

session_command(
    "push",
    "Upload an adapter to the Hub, with a model card. The access token comes from HF_TOKEN, a login, or a secret of "
    "Colab or Kaggle.",
    argument("repo", metavar="USER/NAME", help="the repository, created if needed"),
    argument("--adapter", "-a", metavar="NAME", completes="adapter", help="the adapter, if there are several"),
    argument("--private", action="store_true", default=None, help="make a new repository private"),
    argument("--message", metavar="TEXT", help="message of the commit (default: Upload adapter)"),
    argument("--revision", metavar="BRANCH", help="a branch, created if needed (default: main)"),
    argument("--replace", action="store_true", help="overwrite another adapter in that repository"),
    ON_MODEL,
    example="%lora push user/sql-adapter --private",
)


@subcommand(
    "ship",
    "Export an adapter for an inference engine, after checking that the engine supports it.",
    argument("name", nargs="?", metavar="NAME", completes="adapter", help="the adapter, if there are several"),
    argument(
        "--for",
        dest="engine",
        required=True,
        metavar="ENGINE",
        words=SERVING_ENGINES,
        help=f"one of {', '.join(SERVING_ENGINES)}",
    ),
    argument("--to", metavar="DIR", completes="path", help="a new folder (default: NAME-ENGINE)"),
    argument("--merged", action="store_true", help="export the merged model instead of the adapter"),
    argument(
        "--quantize",
        metavar="TYPE",
        words=STORED_TYPES,
        help="data type of the weights: f32, f16, bf16, in GGUF files q8_0, of whole models also q6_k, q5_k_m or "
        "q4_k_m (default: the engine's usual one)",
    ),
    argument(
        "--base",
        metavar="NAME",
        help="for ollama: the base model's name in Ollama, e.g. llama3.2:1b; without it the model is exported merged",
    ),
    argument(
        "--calibrate",
        metavar="DATA",
        completes="data",
        help="for q4_k_m, q5_k_m and q6_k: rows, as for %%lora_train --data; errors that matter there become smaller",
    ),
    argument("--replace", action="store_true", help="replace an earlier export in that folder"),
    argument("--dry-run", action="store_true", help="only show what would be written"),
    TOKENIZER,
    ON_MODEL,
    example="%lora ship sql --for vllm --to served/sql",
)
def ship(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Export one adapter for an engine."""
    needs_tokenizer = options.merged or options.engine == "ollama"
    return notebook.session.ship(
        options.name,
        engine=options.engine,
        to=options.to,
        merged=options.merged,
        quantize=options.quantize,
        base=options.base,
        tokenizer=notebook.tokenizer(options.tokenizer) if needs_tokenizer or options.tokenizer else None,
        calibrate=None if options.calibrate is None else notebook.data(options.calibrate, "--calibrate"),
        replace=options.replace,
        dry_run=options.dry_run,
        model=notebook.chosen(options.model),
    )
