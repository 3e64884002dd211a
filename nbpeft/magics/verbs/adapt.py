"""Adding adapters, loading and saving them."""

from __future__ import annotations

import argparse

from nbpeft.errors import CellError
from nbpeft.magics.adapting import ADAPT_OPTIONS, adapt
from nbpeft.magics.body import parse_fields
from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, verb


@verb(
    "add",
    "Configure and apply an adapter: the one-line form of %%lora.",
    argument("target", metavar="MODEL", completes="model", help="variable that holds the model"),
    *ADAPT_OPTIONS,
    fields="config",
    example="%lora add model --name sql r=8 target_modules=q_proj,v_proj",
)
def add(options: argparse.Namespace, desk: Desk) -> object:
    """Adds an adapter from ``name=value`` words."""
    return adapt(desk, options, parse_fields(options.fields, desk.namespace))


@verb(
    "load",
    "Load a saved adapter from a folder or the hub.",
    argument("path", metavar="PATH", completes="path", help="a folder, or a repository on the hub"),
    argument("--name", "-n", metavar="NAME", help="what to call it; the last part of PATH if left out"),
    argument("--train", action="store_true", help="load it to train it further; otherwise it is frozen"),
    ON_MODEL,
    example="%lora load adapters/sql --name sql",
)
def load(options: argparse.Namespace, desk: Desk) -> object:
    """Loads an adapter; a bare model becomes an adapted one in its variable."""
    model, variable = desk.chosen(options.model), options.model
    if model is None and not desk.session.names:
        variable = desk.only_model("%lora load")
        model = desk.module(variable)
    result = desk.session.load(options.path, name=options.name, model=model, variable=variable, trainable=options.train)
    if variable is not None and variable in desk.namespace:
        desk.bind(variable, result.model)
    result.release()
    return result


@verb(
    "save",
    "Save adapters as PEFT does.",
    argument("folder", metavar="DIR", completes="path", help="made if need be"),
    argument("--name", "-n", metavar="NAME", completes="adapter", help="only this adapter; all if left out"),
    ON_MODEL,
    example="%lora save adapters/sql --name sql",
)
def save(options: argparse.Namespace, desk: Desk) -> object:
    """Saves one adapter or all."""
    if not options.folder.strip():
        raise CellError("%lora save needs a folder")
    return desk.session.save(options.folder, name=options.name, model=desk.chosen(options.model))
