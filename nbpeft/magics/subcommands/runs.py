"""Trainings on disk: going on with one, listing, comparing, renaming and deleting them."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

from nbpeft.errors import AdapterError, CellError
from nbpeft.magics.body import with_fields
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import Subcommand, argument, parse_arguments
from nbpeft.magics.registry import cell_command, subcommand
from nbpeft.magics.subcommands.training import training_arguments, training_data
from nbpeft.magics.tokenize import tokenize
from nbpeft.session.handles import is_handle, uncompiled
from nbpeft.session.results.kept_runs import SORTS

_CELL = "lora_train"


@subcommand(
    "resume",
    "Go on with a training that was broken off, from the last state that was kept. A new kernel needs the model "
    "and the rows in the same variables; the adapter comes back by itself.",
    argument("run", nargs="?", metavar="RUN", completes="run", help="the newest one if left out"),
    argument("--model", "-m", metavar="MODEL", completes="model", help="its variable; that of then if left out"),
    example="%lora resume sql-3",
)
def resume(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Evaluate the cell of a run again, and let it go on.

    Raises:
        CellError: a variable of it is not there, or it was not a cell.
    """
    session = notebook.session
    record, facts = session.kept_run(options.run)
    source = facts.get("source") or {}
    target = options.model or record.model
    if not target:
        raise CellError(f"say which model run {record.name} goes on with: --model MODEL")
    given: dict[str, Any] = {}
    if record.status != "finished":
        if "line" not in source:
            raise CellError(
                f"run {record.name} was not started by a cell, so its rows are not known here: "
                f"session.resume({record.name!r}, data=…)"
            )
        given = _of_cell(cell_command(_CELL), source, notebook)
    model = notebook.module(target)
    try:
        result = session.resume(record.name, model=model, variable=target, **given)
    except BaseException:
        if not is_handle(uncompiled(model)):  # what it learned until it failed is on the model
            with suppress(AdapterError):
                notebook.namespace[target] = session.model(model)
        raise
    notebook.namespace[target] = result.model
    result.release()
    return result


def _of_cell(command: Subcommand, source: dict[str, str], notebook: NotebookContext) -> dict[str, Any]:
    """What a training cell gives to the session, evaluated now."""
    request = parse_arguments(command, f"%%{_CELL}", tokenize(source["line"]), notebook.namespace)
    options = with_fields(request.options, source.get("cell", ""), notebook.namespace)
    data, eval_data, tokenizer = training_data(options, notebook)
    given = {"data": data, "eval_data": eval_data, "tokenizer": tokenizer, **training_arguments(options, notebook)}
    if options.trainer is not None:
        given["trainer_class"] = notebook.value(options.trainer, "--trainer")
    if options.track:
        given["track"] = options.track
    return given


@subcommand(
    "runs",
    "List the trainings that are kept on disk, or compare some of them: their curves, and what differs.",
    argument("names", nargs="*", metavar="RUN", completes="run", help="runs to compare; all are listed without any"),
    argument("--sort", metavar="COLUMN", default="time", choices=SORTS, words=SORTS, help=" ".join(SORTS)),
    argument("--delete", metavar="NAME", completes="run", help="delete the run of exactly this name"),
    argument("--rename", nargs=2, metavar=("NAME", "NEW"), help="give a run another name"),
    example="%lora runs sql-1 sql-3",
)
def runs(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """List, compare, rename or delete runs."""
    if options.delete is not None:
        return notebook.session.delete_run(options.delete)
    if options.rename is not None:
        return notebook.session.rename_run(*options.rename)
    return notebook.session.runs(*options.names, sort=options.sort)
