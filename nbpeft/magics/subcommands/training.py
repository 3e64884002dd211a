"""``%%lora_train``, and the export of the last training as a script."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbpeft._util.mixtures import Mixture
from nbpeft.errors import CellError, UnknownAdapterError, did_you_mean, few
from nbpeft.magics.notebook_context import NotebookContext, TrainingCell, which_model
from nbpeft.magics.parse import argument, positive, prompt_text, rows_by_adapter
from nbpeft.magics.registry import (
    CHATS,
    COLUMNS,
    DATA,
    MAX_LENGTH,
    MODEL,
    SEPARATOR,
    SKIP_BAD,
    TOKENIZER,
    chats_of,
    refuse_fields,
    separator_of,
    subcommand,
)
from nbpeft.magics.subcommands.scoring import metric_of
from nbpeft.magics.tokenize import quoted
from nbpeft.names import METRICS
from nbpeft.session.fields import objective_names
from nbpeft.state import NamedRows
from nbpeft.sweeps import Sweep

_RESERVED = (
    "data",
    "eval_data",
    "columns",
    "model",
    "tokenizer",
    "adapter",
    "background",
    "keep",
    "restart",
    "replace",
    "control",
    "publish",
    "run_factory",
    "run_dir",
    "source",
    "data_hint",
    "variable",
    "run",
    "processes",
    "hosts",
)
ROWS = ("data", "eval_data", "score", "tokenizer")
"""Options of a line about the rows."""
FUNCTIONS = ("reward", "metric")
"""Options of a line that take functions."""
_NOT_EXPORTED = (
    "halving",
    "sample",
    "every",
    "score",
    "metric",
    "max_score_rows",
    "max_new_tokens",
    "processes",
    "hosts",
)
"""Arguments that are not written into an exported script."""
_EARLY_STOPPING = ("patience", "metric_for_best_model", "greater_is_better")
"""Arguments that are not written into it either if they refer to scores, which a script does not compute."""
EVAL = argument(
    *("--eval-data", "-e"),
    metavar="DATA",
    completes="data",
    help="evaluation rows, as for --data; or how many training rows to hold out: 0.1, or 64",
)
EVAL_BY = argument(
    "--eval-by",
    metavar="COLUMN",
    help="rows with the same value in this column are all trained on or all held out by --eval-data",
)
SCORE = (
    argument(
        "--score",
        metavar="DATA",
        completes="data",
        help="score the adapter on these rows during training; --patience then monitors the score",
    ),
    argument(
        "--metric",
        nargs="+",
        metavar="METRIC",
        words=METRICS,
        completes="variable",
        help="how to score, as for %%lora score (default: exact; accuracy for a classifier)",
    ),
    argument(
        "--max-score-rows",
        type=positive,
        metavar="N",
        help="score at most N of the rows each time (default: 200 if answers are generated, else all)",
    ),
    argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="maximum length of a scored answer in tokens (default: as for %%lora score)",
    ),
)
TRACK = argument(
    "--track",
    metavar="TRACKER",
    action="append",
    choices=("tensorboard", "wandb", "trackio"),
    words=("tensorboard", "wandb", "trackio"),
    help="log the metrics to tensorboard, wandb or trackio as well",
)
OBJECTIVE = (
    argument(
        "--objective",
        metavar="NAME",
        words=objective_names(),
        help=f"{', '.join(objective_names())} (default: according to the rows; dpo for chosen and rejected, "
        "reward for a classifier with one label, kto for labels of good and bad completions, grpo with --reward)",
    ),
    argument(
        "--reference",
        metavar="NAME",
        completes="adapter",
        words=("base", "start"),
        help="for dpo and kto, and grpo with beta: base, start (the adapter as it is now) or another adapter "
        "(default: base for a new adapter, else start)",
    ),
)
REWARD = argument(
    "--reward",
    action="append",
    metavar="FUNCTION",
    completes="variable",
    help="for grpo: a function f(completions, prompts, **columns) that returns a number for each completion; may be "
    "repeated",
)
PROCESSES = (
    argument(
        "--processes",
        type=positive,
        metavar="N",
        help="train in N processes, one per GPU; with fsdp = True in the cell the model is sharded over them",
    ),
    argument(
        "--hosts",
        nargs="+",
        metavar="ADDRESS",
        help="run N processes on each of these machines, this one first; all must have this folder at the same path",
    ),
)
REPLACE = argument("--replace", action="store_true", help="overwrite another adapter in output_dir")
TRAINER = argument(
    "--trainer-class", metavar="CLASS", completes="variable", help="a Trainer class of another library to use"
)


@subcommand(
    "lora_train",
    "Train the active adapters of a model. The cell's lines are fields of TrainingArguments, name = value.",
    MODEL,
    dataclasses.replace(
        DATA, options={**DATA.options, "help": f"{DATA.options['help']}; or rows for each adapter: NAME=DATA NAME=DATA"}
    ),
    EVAL,
    COLUMNS,
    SEPARATOR,
    SKIP_BAD,
    *CHATS,
    EVAL_BY,
    TOKENIZER,
    argument("--adapter", "-a", metavar="NAME", completes="adapter", help="activate this adapter; it stays active"),
    *OBJECTIVE,
    REWARD,
    MAX_LENGTH,
    argument("--packing", action="store_true", help="pack several rows into each sequence of --max-length: no padding"),
    argument(
        "--restart",
        action="store_true",
        help="start from the adapter's initial weights; in a sweep its adapters do, and this adapter is not changed",
    ),
    argument("--no-keep", dest="keep", action="store_false", help="store no run folder on disk"),
    REPLACE,
    TRACK,
    argument(
        "--patience",
        type=positive,
        metavar="N",
        help="early stopping: end after N evaluations, or scores, without improvement, and restore the best weights",
    ),
    argument(
        "--halving",
        action="store_true",
        help="in a sweep: stop the worse half of the adapters each time the number of steps has doubled",
    ),
    argument(
        "--sample",
        action="append",
        metavar="PROMPT|N",
        completes="variable",
        help="answer this prompt during training, as for %%lora ask; may be repeated. A number: answer that many "
        "evaluation rows (without --eval-data, training rows) and show the wanted answers",
    ),
    *SCORE,
    argument(
        "--every",
        type=positive,
        metavar="STEPS",
        help="steps between samples and between scores (default: about five and ten per run)",
    ),
    *PROCESSES,
    TRAINER,
    argument("--background", "-b", action="store_true", help="train in the background: the cell returns at once"),
    fields="training",
    example="%%lora_train model --data train_ds --eval-data eval_ds --tokenizer tok\nnum_train_epochs = 1",
    cell=True,
)
def train(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Train; ``options.fields`` are the training arguments."""
    model = notebook.module(options.target)
    data, eval_data, tokenizer = _training_data(options, notebook)
    arguments = training_arguments(options, notebook)
    with _adapter_named(options.adapter, options.target):
        result = notebook.session.train(
            model,
            data,
            eval_data,
            tokenizer=tokenizer,
            adapter=options.adapter,
            background=options.background,
            keep=options.keep,
            restart=options.restart,
            source=notebook.source(
                options.fields,
                {name: getattr(options, name) for name in ROWS},
                {name: getattr(options, name) for name in FUNCTIONS},
            ),
            data_hint=f"{_data_command(options, arguments, data)} shows them",
            named_rows=rows_to_score(options, arguments, data, eval_data),
            **arguments,
        )
    for name in ("track", "trainer_class", "replace"):
        if name not in options.fields:
            arguments.pop(name, None)
    written = {name: value for name, value in _with_best_values(arguments, result).items() if name not in _NOT_EXPORTED}
    stops_by_scores = "score" in arguments and "patience" in written
    for name in _EARLY_STOPPING if stops_by_scores else ():
        written.pop(name, None)
    left_out = notebook.session.unwritable(written)
    notebook.trained[options.target] = TrainingCell(
        data=options.data,
        eval_data=options.eval_data,
        tokenizer=options.tokenizer,
        arguments={name: value for name, value in written.items() if name not in left_out},
        left_out=(*left_out, *(["--trainer-class"] if options.trainer_class is not None else [])),
        notes=("the script does not stop early: patience monitors scores in the cell",) if stops_by_scores else (),
    )
    return result


@contextlib.contextmanager
def _adapter_named(name: str | None, target: str) -> Iterator[None]:
    """A block in which the error about an adapter that the model does not have names the cell that adds it."""
    try:
        yield
    except UnknownAdapterError as error:
        if name is None or error.details.get("name") != name:
            raise
        raise CellError(f"{error} A new adapter is added first: %%lora {target} --name {name}") from None


def _with_best_values(arguments: Mapping[str, Any], result: object) -> dict[str, Any]:
    """The fields of a training; for a sweep, with the values of its best adapter, which is active now."""
    best: Mapping[str, Any] | None = getattr(result, "best_fields", None)
    if best is None:
        return dict(arguments)
    return {**{name: value for name, value in arguments.items() if not isinstance(value, Sweep)}, **best}


def training_arguments(options: argparse.Namespace, notebook: NotebookContext) -> dict[str, Any]:
    """The fields of a training cell, together with those that the options of its line set.

    Raises:
        CellError: a field is given that is an option of the line.
    """
    names: tuple[str, ...] = ("columns", "max_length", "patience", "every", "processes", "hosts", "track", "replace")
    names += ("halving", "skip_bad", "objective", "reference", "eval_by", "max_score_rows", "max_new_tokens")
    sample = getattr(options, "sample", None)
    line = {name: getattr(options, name, None) or None for name in names}
    line["sample"] = _samples(sample, notebook) if sample else None
    line["separator"] = separator_of(options) if getattr(options, "separator", None) else None
    score, metric = getattr(options, "score", None), getattr(options, "metric", None)
    line["score"] = None if score is None else notebook.data(score, "--score")
    line["metric"] = None if metric is None else [metric_of(word, notebook) for word in metric]
    reward = getattr(options, "reward", None)
    line["reward"] = None if reward is None else [notebook.function(word, "--reward") for word in reward]
    line["packing"] = getattr(options, "packing", None) or None
    line["trainer_class"] = (
        None if options.trainer_class is None else notebook.value(options.trainer_class, "--trainer-class")
    )
    given = {name: value for name, value in {**line, **chats_of(options)}.items() if value is not None}
    refuse_fields(options, (*_RESERVED, *given))
    return {**options.fields, **given}


def _samples(words: Sequence[str], notebook: NotebookContext) -> Any:
    """The prompts of ``--sample``, or the number of rows to answer."""
    counts = [int(word) for word in words if word.isdecimal()]
    if counts and len(words) > 1:
        raise CellError("--sample takes either a number of rows or prompts, not both")
    if counts:
        return counts[0]
    prompts = [notebook.prompt(prompt_text(word), "--sample") for word in words]
    return prompts[0] if len(prompts) == 1 and not isinstance(prompts[0], str) else prompts


@subcommand(
    "export",
    "Write the last %%lora_train cell as a script, for accelerate launch on several GPUs or machines.",
    argument("path", metavar="SCRIPT", completes="path", help="a new .py file; the rows are written next to it"),
    argument("--base", metavar="SOURCE", completes="path", help="folder or Hub id of the base model for the script"),
    argument("--replace", action="store_true", help="overwrite another file, or a script that was edited"),
    argument("--model", "-m", metavar="MODEL", completes="model", help="the model; not needed if only one was trained"),
    example="%lora export train.py",
)
def export(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Write the last training of a model as a script."""
    if options.model is None and len(notebook.trained) > 1:
        raise which_model(list(notebook.trained), "%lora export SCRIPT --model")
    target = str(options.model or next(iter(notebook.trained), ""))
    cell = notebook.trained.get(target)
    if cell is None:
        what = f"{target!r} was not trained" if options.model else "nothing was trained"
        raise CellError(f"{what} by a %%lora_train cell in this notebook, so there is nothing to export yet")
    if cell.left_out:
        raise CellError(f"{', '.join(cell.left_out)}: objects of the notebook cannot be written into a script")
    data, eval_data, tokenizer = _training_data(cell, notebook)
    result = notebook.session.export(
        options.path,
        data,
        eval_data,
        tokenizer=tokenizer,
        base=options.base,
        replace=options.replace,
        model=notebook.module(target),
        **cell.arguments,
    )
    return dataclasses.replace(result, notes=(*result.notes, *cell.notes))


def _training_data(cell: argparse.Namespace | TrainingCell, notebook: NotebookContext) -> tuple[Any, Any, Any]:
    """The training rows, the evaluation rows and the tokenizer that a cell names; None for those that it does not."""
    data, adapters = notebook.data(cell.data, "--data"), notebook.adapter_names()
    if (named := rows_by_adapter(cell.data)) and isinstance(data, dict) and not {*named} & {*adapters}:
        hint = did_you_mean(next(iter(named)), adapters)
        raise CellError(f"--data: no adapter is called {few(named)} (adapters: {few(adapters)}).{hint}")
    eval_data = None if cell.eval_data is None else notebook.data(cell.eval_data, "--eval-data")
    return data, eval_data, notebook.tokenizer(cell.tokenizer)


def rows_to_score(
    options: argparse.Namespace, arguments: Mapping[str, Any], data: object, eval_data: object
) -> NamedRows:
    """The rows on which a trained adapter is scored: those to evaluate on, else those of the training.

    Args:
        options: texts of ``data``, ``eval_data`` and ``tokenizer``, and the options for reading the rows.
        arguments: arguments of the training.
        data: the rows that ``options.data`` names.
        eval_data: the rows, or the amount of rows, that ``options.eval_data`` names.
    """
    amount = isinstance(eval_data, int | float)
    learned = eval_data is None or amount
    text, rows = (options.data, data) if learned else (options.eval_data, eval_data)
    how, columns = _reading_words(options, arguments), _columns_words(options)
    if isinstance(rows, Mapping):  # each adapter has its own
        own = tuple((name, " ".join([quoted(part), *how])) for name, part in rows_by_adapter(text).items())
        return NamedRows("", learned, amount, own, " ".join(columns))
    trained_on = "" if isinstance(data, Mapping) else options.data
    return NamedRows(" ".join([quoted(text), *how, *columns]), learned, amount, trained_on=trained_on)


def _data_command(options: argparse.Namespace, arguments: Mapping[str, Any], data: object) -> str:
    """The command that shows the rows of a training."""
    mixed = isinstance(data, Mixture)
    words = [f"%lora data {'DATA' if isinstance(data, Mapping) else quoted(options.data)}"]
    words += [*_reading_words(options, arguments), *_columns_words(options)]
    words += [f"--seed {arguments['seed']}"] if mixed and isinstance(arguments.get("seed"), int) else []
    given = chats_of(options)
    words += [f"--{name} {given[name]}" for name in ("learn", "reasoning") if name in given]
    return " ".join(words)


def _reading_words(options: argparse.Namespace, arguments: Mapping[str, Any]) -> list[str]:
    """The options for reading rows that training, preview and scores have in common, without the columns."""
    words = [f"--tokenizer {options.tokenizer}"] if options.tokenizer else []
    words += [f"--max-length {arguments['max_length']}"] if "max_length" in arguments else []
    words += [f"--long {options.long}"] if options.long else []
    words += [f"--separator {quoted(options.separator)}"] if options.separator else []
    words += ["--skip-bad"] if options.skip_bad else []
    return words + _pairs("--template", options.chat_template_kwargs)


def _columns_words(options: argparse.Namespace) -> list[str]:
    return _pairs("--columns", options.columns)


def _pairs(option: str, pairs: Mapping[str, Any] | None) -> list[str]:
    """An option with its ``name=value`` pairs; empty without any."""
    given = [f"{name}={quoted(str(value))}" for name, value in (pairs or {}).items()]
    return [option, *given] if given else []
