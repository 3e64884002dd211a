"""``%%qlora``: quantize a model, prepare it for training and add an adapter, in one cell."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbpeft.errors import CellError, ConfigError, did_you_mean, with_article
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ADAPTER_NAME, ALLOW_MISSING, METHOD, fields_of, subcommand
from nbpeft.magics.subcommands.planning import DRY_RUN_SIZES, refuse_sizes, settings_of
from nbpeft.session.commands.quantizing import LOADING_FIELDS, PREPARING_FIELDS, QUANTIZATION_FIELDS
from nbpeft.session.configs import field_hint, field_names
from nbpeft.session.handles import is_module

_DEFAULT_VARIABLE = "model"
OWN_FIELDS = (*QUANTIZATION_FIELDS, *PREPARING_FIELDS, *LOADING_FIELDS)
"""Fields of the quantization, preparation and loading, which are not fields of the adapter's config."""


@subcommand(
    "qlora",
    "Load a model quantized (or quantize one in memory), prepare it for training, and add an adapter. "
    "The cell's lines are fields of the quantization and of the config, name = value.",
    argument(
        "target",
        metavar="SOURCE",
        completes="source",
        help="folder, Hub id, .gguf file, or variable with a loaded model",
    ),
    argument(
        "--as",
        dest="variable",
        metavar="MODEL",
        completes="model",
        help="variable for the model, even one that is in use (default: SOURCE if it is a variable; otherwise model, "
        "which must be unused or come from an earlier run of this cell)",
    ),
    argument("--replace", action="store_true", help="replace MODEL even if it has adapters that are not saved"),
    ADAPTER_NAME,
    replace(METHOD, options={**METHOD.options, "help": "lora (the default), ia3, …; determines the fields"}),
    argument(
        "--dry-run", action="store_true", help="only show what would be loaded, quantized and adapted, and the memory"
    ),
    *DRY_RUN_SIZES,
    ALLOW_MISSING,
    fields="qlora",
    example="%%qlora HuggingFaceTB/SmolLM2-135M-Instruct --as model --name sql\nbits = 4\nr = 16",
    cell=True,
)
def qlora(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Quantize, prepare and adapt a model, or show what that would do."""
    session = notebook.session
    source, variable = _source(options, notebook)
    own, config = _sorted(fields_of(options))
    sizes = settings_of(options)
    if options.dry_run:
        return session.preview_qlora(source, config, name=options.name, variable=variable, **sizes, **own)
    refuse_sizes(sizes)
    if not options.replace:
        _refuse_rebinding(variable, source, own, notebook, named=options.variable is not None)
    result = session.qlora(
        source, config, name=options.name, variable=variable, allow_missing=options.allow_missing, **own
    )
    notebook.namespace[variable] = result.model
    result.release()
    return result


def _source(options: argparse.Namespace, notebook: NotebookContext) -> tuple[Any, str]:
    """The model to quantize or its source, and the variable for the result."""
    word = options.target
    if options.variable is not None and not options.variable.isidentifier():
        raise CellError(f"--as takes the name of a variable, not {options.variable!r:.60}")
    if word in notebook.namespace and not os.path.exists(word):
        value = notebook.namespace[word]
        if is_module(value):
            return value, options.variable or word
        if isinstance(value, str | os.PathLike):
            raise CellError(f"{word!r:.60} is a variable with text; write ${word:.60} to use its value")
    if word.isidentifier() and not os.path.exists(word):
        hint = did_you_mean(word, notebook.model_names())
        if hint:
            raise CellError(f"no variable and no folder is called {word!r:.60}.{hint}")
    return word, options.variable or _DEFAULT_VARIABLE


def _refuse_rebinding(
    variable: str, source: Any, own: Mapping[str, Any], notebook: NotebookContext, *, named: bool
) -> None:
    """Refuse to overwrite a variable that has unsaved adapters, or that is in use and was not named with ``--as``."""
    value = notebook.namespace.get(variable)
    if value is None or value is source:
        return
    if isinstance(source, str) and notebook.session.would_reuse(value, variable, source, own):
        return
    unsaved = notebook.session.unsaved(value)
    if unsaved:
        raise CellError(
            f"{variable!r} holds training that is not saved ({', '.join(map(repr, unsaved))}): save it (%lora save DIR "
            f"--model {variable}), name another variable with --as, or discard it with --replace"
        )
    if named:
        return
    content = with_article(value)
    adapters = getattr(value, "peft_config", None)
    if isinstance(adapters, dict):
        content += f" with {', '.join(map(repr, adapters))}"
    raise CellError(
        f"{variable!r} holds {content}; give --as NAME for the new model, or --as {variable} to overwrite it"
    )


def _sorted(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the fields of quantization, preparation and loading from those of the adapter's config."""
    own = {name: value for name, value in fields.items() if name in OWN_FIELDS}
    config = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
    known = field_names(config.get("peft_type") or "LORA")
    for name in config:
        if name not in known:
            raise ConfigError(f"%%qlora has no field {name!r}.{field_hint(name, [*OWN_FIELDS, *known])}", field=name)
    return own, config
