"""Configuring, loading, saving, deleting, renaming, copying and freezing adapters."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, positive
from nbpeft.magics.registry import (
    ADAPTER,
    ADAPTER_NAME,
    ALLOW_MISSING,
    COLUMNS,
    METHOD,
    MODEL,
    NEW_NAME,
    ON_MODEL,
    TOKENIZER,
    fields_of,
    session_command,
    subcommand,
)
from nbpeft.magics.subcommands.planning import DRY_RUN_SIZES, refuse_sizes, settings_of
from nbpeft.session.results import RestoreResult

_DEFAULTS = "no field is given, so these are PEFT's defaults; r = 16 with target_modules = 'all-linear' learns more"

_READING = (
    argument("--init-rows", type=positive, metavar="N", help="number of rows to use (default: 256)"),
    TOKENIZER,
    COLUMNS,
)
"""Options about the rows of a data-driven initialization."""
_ARGUMENTS = (
    MODEL,
    ADAPTER_NAME,
    METHOD,
    argument("--dry-run", action="store_true", help="only show the layers, counts and memory"),
    DRY_RUN_SIZES[0],
    replace(
        DRY_RUN_SIZES[1],
        options={
            **DRY_RUN_SIZES[1].options,
            "help": "maximum length of a row in tokens, for --dry-run and --init-data",
        },
    ),
    *DRY_RUN_SIZES[2:],
    ALLOW_MISSING,
    argument("--no-trainable", dest="trainable", action="store_false", help="apply it frozen, without training it"),
    argument(
        "--init-data",
        metavar="DATA",
        completes="data",
        help="rows for initialization, as for %%lora_train --data, if init_lora_weights is 'eva', 'corda' or 'lora_ga'",
    ),
    *(replace(item, options={**item.options, "help": f"for --init-data: {item.options['help']}"}) for item in _READING),
)


@subcommand(
    "lora",
    "Configure an adapter and apply it to a model. The cell's lines are fields of the config, name = value.",
    *_ARGUMENTS,
    fields="config",
    example="%%lora model --name sql\nr = 16\ntarget_modules = 'all-linear'",
    cell=True,
)
@subcommand(
    "add",
    "Configure and apply an adapter: the one-line form of %%lora.",
    *_ARGUMENTS,
    fields="config",
    example="%lora add model --name sql r=8 target_modules=q_proj,v_proj",
)
def add(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Adapt the model in a variable, or show what that would do."""
    variable, fields, sizes = options.target, fields_of(options), settings_of(options)
    model = notebook.module(variable)
    if options.dry_run:
        return notebook.session.preview(model, fields, name=options.name, variable=variable, **sizes)
    length = None if options.init_data is None else sizes.pop("max_length", None)
    refuse_sizes(sizes)
    result = notebook.session.add(
        model,
        fields,
        name=options.name,
        variable=variable,
        allow_missing=options.allow_missing,
        trainable=options.trainable,
        max_length=length,
        **_rows_to_start_from(options, notebook),
    )
    notebook.bind(variable, result)
    return result if fields else replace(result, notes=(*result.notes, _DEFAULTS))


def _rows_to_start_from(options: argparse.Namespace, notebook: NotebookContext) -> dict[str, Any]:
    """The arguments of ``Session.add`` about the rows of a data-driven initialization."""
    arguments = {name: getattr(options, name) for name in ("init_rows", "tokenizer", "columns")}
    if options.init_data is None:
        return arguments
    data, tokenizer = notebook.data(options.init_data, "--init-data"), notebook.tokenizer(options.tokenizer)
    return {**arguments, "init_data": data, "tokenizer": tokenizer}


@subcommand(
    "load",
    "Load a saved adapter from a folder or the Hub, with the access token that push uses.",
    argument(
        "path", metavar="PATH", completes="saved", help="a folder, or a repository on the Hub: user/name@revision"
    ),
    argument("--name", "-n", metavar="NAME", help="name of the adapter (default: the last part of PATH)"),
    argument("--revision", metavar="REVISION", help="a branch, tag or commit on the Hub (default: main)"),
    argument("--subfolder", metavar="DIR", help="folder of the adapter in PATH"),
    argument("--trainable", action="store_true", help="load it to train it further; otherwise it is frozen"),
    argument("--replace", action="store_true", help="replace an adapter of that name"),
    ON_MODEL,
    example="%lora load adapters/sql --name sql",
)
def load(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Load an adapter; a bare model becomes an adapted one in its variable."""
    model, variable = notebook.chosen(options.model), options.model
    if model is None and not notebook.session.names:
        variable = notebook.only_model("%lora load")
        model = notebook.module(variable)
    keywords = {"trainable": options.trainable, "replace": options.replace}
    keywords |= {"revision": options.revision, "subfolder": options.subfolder}
    result = notebook.session.load(options.path, name=options.name, model=model, variable=variable, **keywords)
    notebook.bind(variable, result)
    return result


@subcommand(
    "save",
    "Save adapters in PEFT's format.",
    argument("folder", metavar="DIR", completes="path", help="the folder, created if needed"),
    argument("--adapter", "-a", metavar="NAME", completes="adapter", help="only this adapter (default: all)"),
    argument("--replace", action="store_true", help="overwrite another adapter in that folder"),
    ON_MODEL,
    example="%lora save adapters/sql --adapter sql",
)
def save(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Save one adapter or all."""
    if not options.folder.strip():
        raise CellError("%lora save needs a folder")
    model = notebook.chosen(options.model)
    return notebook.session.save(options.folder, adapter=options.adapter, model=model, replace=options.replace)


session_command(
    "delete",
    "Delete adapters from the model, all of those named or none.",
    argument("name", nargs="+", metavar="NAME", completes="adapter", help="the adapters"),
    ON_MODEL,
    example="%lora delete sql",
)


@subcommand(
    "undo",
    "Restore the adapter that was last deleted, reconfigured, reset, swapped or replaced; or the unsaved adapters of "
    "the model that the variable referred to before.",
    ON_MODEL,
    example="%lora undo",
)
def undo(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Undo; if adapters of an earlier model are restored, that model is assigned to the variable again."""
    result = notebook.session.undo(model=notebook.chosen(options.model), variable=options.model)
    if isinstance(result, RestoreResult):
        notebook.bind(result.model_name, result)
    return result


session_command(
    "reset",
    "Initialize an adapter again, as its config says; %lora undo restores the old weights.",
    ADAPTER,
    ON_MODEL,
    example="%lora reset sql",
)
session_command(
    "rename", "Give an adapter another name.", ADAPTER, NEW_NAME, ON_MODEL, example="%lora rename sql sql_v1"
)
session_command(
    "copy", "Copy an adapter under a new name.", ADAPTER, NEW_NAME, ON_MODEL, example="%lora copy sql sql_backup"
)
session_command(
    "freeze",
    "Exclude an adapter from training, or with --off include it again.",
    ADAPTER,
    argument("--off", action="store_true", help="train it again while it is active"),
    ON_MODEL,
    example="%lora freeze sql",
)
