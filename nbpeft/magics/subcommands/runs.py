"""Trainings on disk: going on with one, listing, comparing, renaming and deleting them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nbpeft.errors import AdapterError, CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import COLUMNS, DATA, TOKENIZER, subcommand
from nbpeft.magics.subcommands.training import EVAL, PROCESSES, REPLACE, TRACK, TRAINER, training_arguments
from nbpeft.session.handles import is_handle, uncompiled
from nbpeft.session.results.kept_runs import SORTS

_SAID = {
    "data": ("--data", "ROWS"),
    "eval_data": ("--eval", "ROWS"),
    "tokenizer": ("--tokenizer", "TOKENIZER"),
    "trainer_class": ("--trainer", "CLASS"),
}
"""Argument of a training -> how a line gives it."""


@subcommand(
    "resume",
    "Go on with a training that was broken off, from the last state that was kept. A new kernel needs the model "
    "and the rows, in the same variables or named here; the adapter and the settings come back by themselves.",
    argument("run", nargs="?", metavar="RUN", completes="run", help="the newest one if left out"),
    argument("--model", "-m", metavar="MODEL", completes="model", help="its variable; that of then if left out"),
    replace(DATA, options={**DATA.options, "required": False}),
    EVAL,
    COLUMNS,
    TOKENIZER,
    TRAINER,
    TRACK,
    REPLACE,
    *PROCESSES,
    fields="training",
    example="%lora resume sql-3 --data rows",
)
def resume(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Let a run go on. Of what its folder says nothing is evaluated: variables and files are looked up by name.

    Raises:
        CellError: something of it has to be given again.
    """
    session = notebook.session
    record, facts = session.kept_run(options.run)
    target = options.model or record.model
    if not target:
        raise CellError(f"say which model run {record.name} goes on with: --model MODEL")
    given = _given(options, facts, notebook)
    if not record.is_complete and (missing := _missing(facts, given)):
        words = " ".join(" ".join(_SAID.get(name, (f"{name}={{{name}}}",))) for name in missing)
        told = f"run {record.name} used values that are not kept in a file; give them again"
        raise CellError(f"{told}: %lora resume {record.name} {words}")
    model = notebook.module(target)
    try:
        result = session.resume(record.name, model=model, variable=target, **given)
    except BaseException:
        if not is_handle(uncompiled(model)):  # what it learned until it failed is on the model
            with suppress(AdapterError):
                notebook.namespace[target] = session.model(model)
        raise
    notebook.bind(target, result)
    return result


def _given(options: argparse.Namespace, facts: Mapping[str, Any], notebook: NotebookContext) -> dict[str, Any]:
    """What the line gives to the session; where it says nothing of the rows, what has the names that they had then."""
    source = facts.get("source") or {}
    given: dict[str, Any] = training_arguments(options, notebook)
    for name in ("data", "eval_data"):
        text = getattr(options, name)
        given[name] = notebook.by_name(source.get(name)) if text is None else notebook.data(text, _SAID[name][0])
    text = options.tokenizer
    if text is None and notebook.by_name(source.get("tokenizer")) is not None:
        text = source["tokenizer"]
    given["tokenizer"] = notebook.tokenizer(text)
    return given


def _missing(facts: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What a run needs and neither the line nor its folder gives."""
    rows = facts.get("data") or {}
    needed = ["data", *(["eval_data"] if rows.get("eval_rows") else []), *(facts.get("objects") or ())]
    kept = facts.get("arguments") or {}
    return [str(name) for name in needed if given.get(str(name)) is None and kept.get(str(name)) is None]


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
