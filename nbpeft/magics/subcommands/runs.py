"""Training runs on disk: resuming, listing, comparing, renaming and deleting them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from nbpeft.errors import AdapterError, CellError, few
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, rows_by_adapter
from nbpeft.magics.registry import COLUMNS, DATA, TOKENIZER, subcommand
from nbpeft.magics.subcommands.training import (
    EVAL,
    FUNCTIONS,
    PROCESSES,
    REPLACE,
    REWARD,
    SCORE,
    TRACK,
    TRAINER,
    rows_to_score,
    training_arguments,
)
from nbpeft.session.handles import is_handle, uncompiled
from nbpeft.session.results import Notice
from nbpeft.session.results.kept_runs import (
    SORTS,
    ResumeResult,
    RunsComparison,
    RunsResult,
    adapters_with_rows,
    source_of_base,
)

_OPTIONS = {
    "data": ("--data", "DATA"),
    "eval_data": ("--eval-data", "DATA"),
    "score": ("--score", "DATA"),
    "metric": ("--metric", "METRIC"),
    "tokenizer": ("--tokenizer", "TOKENIZER"),
    "trainer_class": ("--trainer-class", "CLASS"),
    "reward": ("--reward", "FUNCTION"),
}
"""Argument of a training -> the option of a line and its placeholder."""
_READING = ("columns", "long", "separator", "skip_bad", "chat_template_kwargs")
"""Arguments of a training on how to read rows."""


@subcommand(
    "resume",
    "Continue a paused training, or resume an interrupted one from its last checkpoint. A new kernel needs the model "
    "and the rows, in the same variables or named here; the adapter and the settings come from the run's folder.",
    argument(
        "run", nargs="?", metavar="RUN", completes="run", help="the run (default: the paused one, else the newest)"
    ),
    argument("--model", "-m", metavar="MODEL", completes="model", help="variable with the model (default: the same)"),
    replace(DATA, options={**DATA.options, "required": False}),
    EVAL,
    *SCORE,
    COLUMNS,
    TOKENIZER,
    TRAINER,
    REWARD,
    TRACK,
    REPLACE,
    *PROCESSES,
    fields="training",
    example="%lora resume sql-3 --data rows",
    refused={
        "background": "a resumed training runs in the foreground",
        "restart": "it continues from the last state of the run; %%lora_train --restart starts anew",
        "adapter": "it restores the adapters of the run",
    },
)
def resume(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Resume a run.

    A run's folder may come from anyone, so none of its text is evaluated: variables and files are looked up by name.
    """
    session = notebook.session
    chosen = notebook.chosen(options.model) if options.model in (None, *session.names) else None
    if session.paused_training(options.run, chosen) is not None:
        rows = {"data": options.data, "eval_data": options.eval_data, "tokenizer": options.tokenizer}
        return session.resume(options.run, model=chosen, **rows, **training_arguments(options, notebook))
    record, facts = session.kept_run(options.run)
    target = options.model or record.model
    if not target:
        raise CellError(f"give the model to resume run {record.name} with: --model MODEL")
    given = _given(options, {} if record.is_complete else facts, notebook)
    if not record.is_complete and (missing := _missing(facts, given)):
        words = [" ".join(_OPTIONS.get(name, (f"{name}={{{name}}}",))) for name in missing]
        words += [] if target in notebook.namespace else ["--model MODEL"]
        message = f"run {record.name} used values that its folder does not store; pass them again"
        command = _for_each(" ".join(words), adapters_with_rows(facts))
        raise CellError(f"{message}: %lora resume {record.name} {command}{_undefined(facts, missing, notebook)}")
    try:
        model = notebook.module(target, base=source_of_base(record) or "user/name")
    except CellError as error:
        if options.model is None:
            raise CellError(
                f"run {record.name} is of the model {target!r:.60} (another one: --model), but {error}"
            ) from None
        raise
    try:
        result = session.resume(record.name, model=model, variable=target, **given)
    except BaseException:
        if not is_handle(uncompiled(model)):  # the model has the adapter as trained until the failure
            with suppress(AdapterError):
                notebook.namespace[target] = session.model(model)
        raise
    if isinstance(result, ResumeResult):
        notebook.bind(target, result)
    return result


def _given(options: argparse.Namespace, facts: Mapping[str, Any], notebook: NotebookContext) -> dict[str, Any]:
    """The arguments for the session; what the line leaves out (rows, tokenizer, functions) is looked up by its name."""
    source = facts.get("source") or {}
    arguments: dict[str, Any] = training_arguments(options, notebook)
    for name in ("data", "eval_data"):
        text = getattr(options, name)
        arguments[name] = notebook.by_name(source.get(name)) if text is None else notebook.data(text, _OPTIONS[name][0])
    if "score" not in arguments and (rows := notebook.by_name(source.get("score"))) is not None:
        arguments["score"] = rows
    for name in FUNCTIONS:
        functions = notebook.own_functions(str(source.get(name) or "").split())
        if functions and name not in arguments:
            arguments[name] = functions
    text = options.tokenizer
    if text is None and notebook.by_name(source.get("tokenizer")) is not None:
        text = source["tokenizer"]
    arguments["tokenizer"] = notebook.tokenizer(text)
    if arguments["data"] is not None:
        texts = {name: getattr(options, name) or source.get(name) for name in ("data", "eval_data")}
        reading = dict.fromkeys(_READING) | (facts.get("arguments") or {}) | arguments
        named = argparse.Namespace(**{**reading, **texts, "tokenizer": text})
        arguments["named_rows"] = rows_to_score(named, reading, arguments["data"], arguments["eval_data"])
    return arguments


def _missing(facts: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The arguments that a run needs and neither the line nor its folder provides."""
    rows = facts.get("data") or {}
    needed = ["data", *(["eval_data"] if rows.get("eval_rows") else []), *(facts.get("objects") or ())]
    stored = facts.get("arguments") or {}
    return [str(name) for name in needed if given.get(str(name)) is None and stored.get(str(name)) is None]


def _for_each(words: str, adapters: Sequence[str]) -> str:
    """The options to pass again, with the names of the adapters that had rows of their own."""
    named = " ".join(f"{name}=DATA" for name in adapters)
    return re.sub(r"(?<=--data )DATA|(?<=--eval-data )DATA", named, words) if named else words


def _undefined(facts: Mapping[str, Any], missing: Sequence[str], notebook: NotebookContext) -> str:
    """The variables of the run's rows that the notebook does not have, as text; empty if there are none."""
    source = facts.get("source") or {}
    functions = [name for name in missing if name in FUNCTIONS]
    texts = [str(source.get(name, "")) for name in missing if name not in functions]
    parts = [part for text in texts for part in (rows_by_adapter(text) or {"": text}).values()]
    parts += [part for name in functions for part in str(source.get(name, "")).split()]
    names = [part for part in dict.fromkeys(parts) if part.isidentifier() and part not in notebook.namespace]
    return f" (not defined here: {few(names, quoted=False)})" if names else ""


@subcommand(
    "runs",
    "List the training runs on disk, or compare some of them: their curves and the settings that differ.",
    argument("names", nargs="*", metavar="RUN", completes="run", help="runs to compare (default: list all)"),
    argument("--sort", metavar="COLUMN", words=SORTS, help=f"one of {', '.join(SORTS)}, or a setting (default: time)"),
    argument("--search", metavar="WORDS", help="list the runs with these words in name, adapter, note or settings"),
    argument("--delete", metavar="NAME", completes="run", help="delete the run with exactly this name"),
    argument("--rename", nargs=2, metavar=("NAME", "NEW"), help="give a run another name"),
    argument("--note", nargs=2, metavar=("NAME", "TEXT"), help="write a note on a run; an empty one removes it"),
    argument(
        "--folder",
        metavar="DIR",
        completes="path",
        help="save runs in this folder from now on, e.g. on a mounted drive; off saves none",
    ),
    example="%lora runs sql-1 sql-3",
)
def runs(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """List, compare, rename, annotate or delete runs."""
    session = notebook.session
    _refuse_beside(options)
    if options.folder is not None and session.runs_folder(options.folder) is None:
        return Notice("no runs are saved from now on")
    if options.delete is not None:
        return session.delete_run(options.delete)
    if options.rename is not None:
        return session.rename_run(*options.rename)
    if options.note is not None:
        return session.note_run(*options.note)
    result = session.runs(*options.names, sort=options.sort, search=options.search if options.names else None)
    if isinstance(result, RunsComparison) or not result.records:
        return result
    found = result.matching(options.search or "")
    listed = _ListWithPanel(**vars(found))
    vars(listed)["panel"] = partial(_panel, notebook, result, options)
    return listed


def _refuse_beside(options: argparse.Namespace) -> None:
    """Refuse anything beside a change: it would be left unused, or fail after the change."""
    changes, others = ("delete", "rename", "note", "folder"), ("sort", "search")
    changed = [f"--{name}" for name in changes if getattr(options, name) is not None]
    beside = [*changed[1:], *(f"--{name}" for name in others if getattr(options, name) is not None)]
    texts = " (a text of several words is put in quotes)" if options.note is not None else ""
    beside += [f"runs to compare{texts}"] if options.names else []
    if changed and beside:
        raise CellError(f"{changed[0]} is used alone: leave out {few(beside, quoted=False)}")


class _ListWithPanel(RunsResult):
    """The runs; where widgets work, they are shown in a panel that can sort and select them."""

    def _ipython_display_(self) -> None:
        show = vars(self).get("panel")
        if show is None:  # a copy, or one that was unpickled
            raise NotImplementedError  # IPython then calls _repr_html_
        show()._ipython_display_()


def _panel(notebook: NotebookContext, result: RunsResult, options: argparse.Namespace) -> Any:
    from nbpeft.widgets import RunsPanel

    sort, search = options.sort or SORTS[0], options.search or ""
    return RunsPanel(notebook.session, result, sort, search=search, ui=notebook.ui)
