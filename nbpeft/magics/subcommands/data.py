"""``%lora data``: training data as the model reads it."""

from __future__ import annotations

import argparse
from dataclasses import replace

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, positive, rows_by_adapter
from nbpeft.magics.registry import (
    CHATS,
    COLUMNS,
    DATA,
    MAX_LENGTH,
    ON_MODEL,
    SEPARATOR,
    SKIP_BAD,
    TOKENIZER,
    chats_of,
    separator_of,
    subcommand,
)


def _shown(text: str) -> int:
    """The number of rows to show; a range of rows is written with the data."""
    if ":" in text:
        raise argparse.ArgumentTypeError(f"a range of rows is written with their name, as in train.csv[{text:.40}]")
    return positive(text)


@subcommand(
    "data",
    "Show rows as the model reads them: template, special tokens, trained tokens and truncation; and the lengths of "
    "all rows.",
    replace(DATA, flags=("data",), options={name: DATA.options[name] for name in ("metavar", "help")}),
    TOKENIZER,
    MAX_LENGTH,
    COLUMNS,
    SEPARATOR,
    SKIP_BAD,
    *CHATS,
    argument("--rows", type=_shown, metavar="N", default=3, help="number of rows to show (default: 3)"),
    argument("--seed", type=int, metavar="N", help="seed of the training, with which the rows of a mixture are drawn"),
    ON_MODEL,
    example="%lora data train.jsonl --tokenizer tok --columns prompt=question completion=answer",
)
def data(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Show data before a training."""
    found = notebook.data(options.data, "data")
    if isinstance(found, dict) and (parts := rows_by_adapter(options.data)):
        lines = " and ".join(f"%lora data {rows}" for rows in parts.values())
        raise CellError(f"data: rows for each adapter are shown one by one: {lines}")
    return notebook.session.data(
        found,
        notebook.tokenizer(options.tokenizer),
        max_length=options.max_length,
        columns=options.columns,
        separator=separator_of(options),
        skip_bad=options.skip_bad,
        **chats_of(options),
        rows=options.rows,
        seed=options.seed,
        name=options.data,
        model=notebook.chosen(options.model),
    )
