"""What ``%%qlora`` does with its line and body."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from nbpeft.errors import CellError, ConfigError, did_you_mean, with_article
from nbpeft.magics.desk import Desk, is_module
from nbpeft.magics.parse import argument
from nbpeft.magics.planning import DRY_SIZES, settings_of, without_dry_run
from nbpeft.session.configs import field_names
from nbpeft.session.quantizing_preview import LOADING_FIELDS, PREPARING_FIELDS, QUANTIZATION_FIELDS

_USUAL = "model"
"""The variable that holds the model where nothing is said."""
OWN_FIELDS = (*QUANTIZATION_FIELDS, *PREPARING_FIELDS, *LOADING_FIELDS)
"""Fields that are not the adapter's."""

QLORA_OPTIONS = (
    argument(
        "target",
        metavar="SOURCE",
        completes="source",
        help="folder, hub id, .gguf file, or variable with a loaded model",
    ),
    argument(
        "--as",
        dest="variable",
        metavar="MODEL",
        completes="model",
        help="variable to hold the model, also one that holds something else (default: SOURCE itself where it is a "
        "variable, else model, which must be free or hold what this cell made before)",
    ),
    argument(
        "--name",
        "-n",
        metavar="NAME",
        default="default",
        completes="adapter",
        help="name of the adapter (default: default)",
    ),
    argument(
        "--dry-run", action="store_true", help="only show what would be loaded, quantized and adapted, and memory"
    ),
    *DRY_SIZES,
    argument("--allow-missing", action="store_true", help="go on where a target matches nothing"),
)


def qlora(options: argparse.Namespace, desk: Desk) -> object:
    """Quantizes, prepares and adapts, or shows what that would do; ``options.fields`` are those of both kinds.

    Raises:
        CellError: the line is wrong.
        ConfigError: a field is unknown or impossible.
    """
    desk.session.adopt(desk.namespace)
    source, variable = _source(options, desk)
    own, config = _sorted(options.fields)
    sizes = settings_of(options)
    if options.dry_run:
        return desk.session.preview_qlora(source, config, name=options.name, variable=variable, **sizes, **own)
    if sizes:
        raise without_dry_run()
    if options.variable is None and isinstance(source, str):
        _refuse_rebinding(variable, source, own, desk)
    result = desk.session.qlora(
        source, config, name=options.name, variable=variable, allow_missing=options.allow_missing, **own
    )
    desk.bind(variable, result.model)
    result.release()
    return result


def _source(options: argparse.Namespace, desk: Desk) -> tuple[Any, str]:
    """What to quantize, and the variable that is to hold it."""
    word = options.target
    if options.variable is not None and not options.variable.isidentifier():
        raise CellError(f"--as takes the name of a variable, not {options.variable!r:.60}")
    if word in desk.namespace and not os.path.exists(word):
        value = desk.namespace[word]
        if is_module(value):
            return value, options.variable or word
        if isinstance(value, str | os.PathLike):
            raise CellError(f"{word!r:.60} is a variable with a text; write ${word:.60} for what it holds")
    if word.isidentifier() and not os.path.exists(word):
        near = did_you_mean(word, desk.model_names())
        if near:
            raise CellError(f"no variable is called {word!r:.60}, and no folder.{near}")
    return word, options.variable or _USUAL


def _refuse_rebinding(variable: str, source: str, own: Mapping[str, Any], desk: Desk) -> None:
    """Refuses to put a new model into a variable that nobody named and that holds something else.

    Raises:
        CellError: it does; says what it holds.
    """
    value = desk.namespace.get(variable)
    if value is None or desk.session.goes_on_with(value, variable, source, own):
        return
    held = with_article(value)
    adapters = getattr(value, "peft_config", None)
    if isinstance(adapters, dict):
        held += f" with {', '.join(map(repr, adapters))}"
    raise CellError(
        f"{variable!r} holds {held}; say --as NAME for the new model, --as {variable} to put it in its place"
    )


def _sorted(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of quantization, preparing and loading; and those of the adapter's config.

    Raises:
        ConfigError: a name belongs to neither.
    """
    own = {name: value for name, value in fields.items() if name in OWN_FIELDS}
    config = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
    known = field_names(config.get("peft_type") or "LORA")
    for name in config:
        if name not in known:
            raise ConfigError(f"%%qlora has no field {name!r}.{did_you_mean(name, [*OWN_FIELDS, *known])}", field=name)
    return own, config
