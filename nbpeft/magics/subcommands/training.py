"""Training in a cell, and the last training as a script."""

from __future__ import annotations

import argparse
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.help import HelpText
from nbpeft.magics.notebook_context import NotebookContext, TrainingCell
from nbpeft.magics.parse import argument, positive, prompt_text
from nbpeft.magics.registry import MODEL, subcommand

_RESERVED = ("data", "eval_data", "model", "tokenizer", "adapter", "control", "publish", "run_factory")


@subcommand(
    "lora_train",
    "Train the active adapters of a model. The cell's lines are fields of TrainingArguments, name = value.",
    MODEL,
    argument(
        "--data",
        "-d",
        required=True,
        metavar="DATA",
        completes="variable",
        help="variable or expression: rows to learn",
    ),
    argument("--eval", "-e", dest="eval_data", metavar="DATA", completes="variable", help="rows to evaluate on"),
    argument(
        "--tokenizer", "-t", metavar="TOKENIZER", completes="variable", help="needed unless the rows are tokenised"
    ),
    argument("--adapter", "-a", metavar="NAME", completes="adapter", help="switch to this adapter; it stays active"),
    argument("--max-length", type=positive, metavar="N", help="tokens a row is cut to"),
    argument(
        "--patience",
        type=positive,
        metavar="N",
        help="end after N evaluations without a better one, and put the best state back; needs --eval",
    ),
    argument("--sample", action="append", metavar="PROMPT", help="answer this while it trains; may be repeated"),
    argument("--every", type=positive, metavar="STEPS", help="how often to sample; about five times a run if left out"),
    argument("--trainer", metavar="CLASS", completes="variable", help="a Trainer class of another library to use"),
    fields="training",
    example="%%lora_train model --data train_ds --eval eval_ds --tokenizer tok\n  num_train_epochs = 1",
    cell=True,
)
def train(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Train; ``options.fields`` are the training arguments.

    Raises:
        CellError: a variable is not there.
    """
    model = notebook.module(options.target)
    notebook.session.adopt(notebook.namespace)
    data, eval_data, tokenizer = _data(options, notebook)
    for name in _RESERVED:
        if name in options.fields:
            raise CellError(f"{name} is given in the magic's line, not in the cell")
    arguments: dict[str, Any] = dict(options.fields)
    given = {name: getattr(options, name) for name in ("max_length", "patience", "every")}
    given["sample"] = [prompt_text(text) for text in options.sample] if options.sample else None
    arguments |= {name: value for name, value in given.items() if value is not None}
    left_out = notebook.session.unwritable(arguments)
    cell = TrainingCell(
        data=options.data,
        eval_data=options.eval_data,
        tokenizer=options.tokenizer,
        arguments={name: value for name, value in arguments.items() if name not in (*left_out, "sample", "every")},
        left_out=(*left_out, *(["--trainer"] if options.trainer is not None else [])),
    )
    if options.trainer is not None:
        arguments["trainer_class"] = notebook.value(options.trainer, "--trainer")
    result = notebook.session.train(model, data, eval_data, tokenizer=tokenizer, adapter=options.adapter, **arguments)
    notebook.trained[options.target] = cell
    return result


@subcommand(
    "traceback",
    "Show the whole traceback of the last command that failed.",
    example="%lora traceback",
)
def show_traceback(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Show the last traceback, kept as text."""
    return HelpText(notebook.session.last_traceback or "no command has failed yet")


@subcommand(
    "export",
    "Write the last %%lora_train cell as a script, for accelerate launch on several GPUs or machines.",
    argument("path", metavar="SCRIPT", completes="path", help="a new .py file; the rows go beside it"),
    argument("--base", metavar="SOURCE", completes="path", help="where the script loads the base model from"),
    argument("--model", "-m", metavar="MODEL", completes="model", help="the model trained last if left out"),
    example="%lora export train.py",
)
def export(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Write the last training of a model as a script.

    Raises:
        CellError: no cell trained it, or one of its fields cannot be written down.
    """
    notebook.session.adopt(notebook.namespace)
    target = str(options.model or next(reversed(notebook.trained), ""))
    cell = notebook.trained.get(target)
    if cell is None:
        what = f"{target!r} was not trained" if options.model else "nothing was trained"
        raise CellError(f"{what} by a %%lora_train cell in this notebook, so there is nothing to export yet")
    if cell.left_out:
        raise CellError(f"{', '.join(cell.left_out)}: objects of the notebook cannot be written into a script")
    data, eval_data, tokenizer = _data(cell, notebook)
    return notebook.session.export(
        options.path,
        data,
        eval_data,
        tokenizer=tokenizer,
        base=options.base,
        model=notebook.module(target),
        **cell.arguments,
    )


def _data(cell: argparse.Namespace | TrainingCell, notebook: NotebookContext) -> tuple[Any, Any, Any]:
    """The values of the expressions for the rows, the rows to evaluate on, and the tokenizer."""
    data = notebook.value(cell.data, "--data")
    eval_data = None if cell.eval_data is None else notebook.value(cell.eval_data, "--eval")
    return data, eval_data, notebook.value(cell.tokenizer, "--tokenizer") if cell.tokenizer else notebook.tokenizer()
