"""What ``%%lora_train`` does with its line and body."""

from __future__ import annotations

import argparse
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.desk import Desk, TrainingCell
from nbpeft.magics.parse import argument, positive
from nbpeft.magics.tokenizers import usual_tokenizer

TRAIN_OPTIONS = (
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
    argument("--trainer", metavar="CLASS", completes="variable", help="a Trainer class of another library to use"),
)


def train(options: argparse.Namespace, desk: Desk) -> object:
    """Trains; ``options.fields`` are the training arguments.

    Raises:
        CellError: a variable is not there.
    """
    model = desk.module(options.target)
    desk.session.adopt(desk.namespace)
    arguments: dict[str, Any] = dict(options.fields)
    data = desk.value(options.data, "--data")
    eval_data = None if options.eval_data is None else desk.value(options.eval_data, "--eval")
    tokenizer = desk.value(options.tokenizer, "--tokenizer") if options.tokenizer else usual_tokenizer(desk)
    for name in ("data", "eval_data", "model", "tokenizer", "adapter", "control", "publish", "run_factory"):
        if name in arguments:
            raise CellError(f"{name} is given in the magic's line, not in the cell")
    if options.max_length is not None:
        arguments["max_length"] = options.max_length
    if options.trainer is not None:
        arguments["trainer_class"] = desk.value(options.trainer, "--trainer")
    result = desk.session.train(model, data, eval_data, tokenizer=tokenizer, adapter=options.adapter, **arguments)
    _keep(options, desk)
    return result


def _keep(options: argparse.Namespace, desk: Desk) -> None:
    """Remembers what the cell said, for ``%lora export``."""
    fields = dict(options.fields)
    left_out = [*desk.session.unwritable(fields), *(["--trainer"] if options.trainer is not None else [])]
    max_length = fields.pop("max_length", None) if options.max_length is None else options.max_length
    kept = {name: value for name, value in fields.items() if name not in (*left_out, "max_length")}
    expressions = (options.data, options.eval_data, options.tokenizer)
    desk.trained[options.target] = TrainingCell(*expressions, max_length, kept, tuple(left_out))


def export(options: argparse.Namespace, desk: Desk) -> object:
    """Writes the last training of a model as a script.

    Raises:
        CellError: no cell trained it, or one of its fields cannot be written down.
    """
    desk.session.adopt(desk.namespace)
    target = str(options.model or next(reversed(desk.trained), ""))
    cell = desk.trained.get(target)
    if cell is None:
        what = f"{target!r} was not trained" if options.model else "nothing was trained"
        raise CellError(f"{what} by a %%lora_train cell in this notebook, so there is nothing to export yet")
    if cell.left_out:
        raise CellError(f"{', '.join(cell.left_out)}: objects of the notebook cannot be written into a script")
    return desk.session.export(
        options.path,
        desk.value(cell.data, "--data"),
        None if cell.eval_data is None else desk.value(cell.eval_data, "--eval"),
        tokenizer=desk.value(cell.tokenizer, "--tokenizer") if cell.tokenizer else usual_tokenizer(desk),
        base=options.base,
        model=desk.module(target),
        max_length=cell.max_length,
        **cell.arguments,
    )
