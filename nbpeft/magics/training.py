"""What ``%%lora_train`` does with its line and body."""

from __future__ import annotations

import argparse
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument
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
    argument("--adapter", "-a", metavar="NAME", completes="adapter", help="switch to this adapter first"),
    argument("--max-length", type=int, metavar="N", help="tokens a row is cut to"),
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
    for name in ("data", "eval_data", "model", "tokenizer", "control", "publish", "run_factory"):
        if name in arguments:
            raise CellError(f"{name} is given in the magic's line, not in the cell")
    if options.max_length is not None:
        arguments["max_length"] = options.max_length
    if options.trainer is not None:
        arguments["trainer_class"] = desk.value(options.trainer, "--trainer")
    if options.adapter is not None:
        desk.session.use(options.adapter, model=model)
    return desk.session.train(model, data, eval_data, tokenizer=tokenizer, **arguments)
