"""The verbs of ``%lora``: every file in ``verbs/`` registers its own."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbpeft.magics.parse import Argument, Verb, argument

Run = Callable[[argparse.Namespace, Any], object]

_verbs: dict[str, Verb] = {}

ON_MODEL = argument(
    "--model",
    "-m",
    metavar="MODEL",
    completes="model",
    help="which model; if left out the one adapted, loaded into, trained or switched last",
)
"""The option of verbs that act on an adapted model."""
THE_MODEL = replace(
    ON_MODEL, options={**ON_MODEL.options, "help": "which model; may be left out where one alone carries adapters"}
)
"""The option of verbs that take something away from an adapted model: where there are several, it is needed."""


def verb(name: str, summary: str, *arguments: Argument, fields: str = "", example: str = "") -> Callable[[Run], Run]:
    """Registers a function as a verb.

    Args:
        name: the word behind ``%lora``.
        summary: one line for the help.
        *arguments: what it takes.
        fields: which fields ``name=value`` words set: ``config``, ``training`` or none.
        example: shown in the help.
    """

    def decorate(run: Run) -> Run:
        _verbs[name] = Verb(name, summary, run, arguments, fields, example)
        return run

    return decorate


def verbs() -> dict[str, Verb]:
    """All verbs by name, in the order of their files."""
    package = importlib.import_module("nbpeft.magics.verbs")
    for item in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{item.name}")
    return dict(_verbs)
