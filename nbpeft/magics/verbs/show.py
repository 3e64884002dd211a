"""Panels, and what is wrong with the installation."""

from __future__ import annotations

import argparse

from nbpeft.errors import CellError, did_you_mean
from nbpeft.magics.comparing import PANELS, comparing_panel
from nbpeft.magics.desk import Desk
from nbpeft.magics.front_end import front_end_checks
from nbpeft.magics.panels import adapters_panel
from nbpeft.magics.parse import argument
from nbpeft.magics.planning import plan_panel
from nbpeft.magics.registry import ON_MODEL, verb
from nbpeft.magics.scan import reference
from nbpeft.session import MemoryReport


@verb(
    "panel",
    "Show the adapters with buttons to switch, save and delete them; or compare, blend, or plan memory.",
    argument("kind", nargs="?", metavar="PANEL", words=PANELS, completes="model", help=f"one of {', '.join(PANELS)}"),
    argument("name", nargs="?", metavar="MODEL", completes="model", help="the current one if left out"),
    example="%lora panel compare",
)
def panel(options: argparse.Namespace, desk: Desk) -> object:
    """Shows a panel; the word is left out for the adapters, as in ``%lora panel model``."""
    kind, variable = options.kind or PANELS[0], options.name
    if kind == "plan":
        return plan_panel(desk, variable, None, {})
    if kind not in PANELS:
        models = desk.model_names()
        if variable is not None or not (reference(kind) or kind in desk.namespace or kind in desk.session.names):
            near = did_you_mean(kind, [*PANELS, *models])
            also = f"; models: {', '.join(models)}" if models else ""
            raise CellError(f"%lora panel has no panel {kind!r}.{near} It has: {', '.join(PANELS)}{also}")
        kind, variable = PANELS[0], kind
    model = desk.chosen(variable)
    name = model if isinstance(model, str) else None if model is None else desk.session.watch(model, name=variable)
    return adapters_panel(desk, name) if kind == PANELS[0] else comparing_panel(desk, kind, name)


@verb(
    "inspect",
    "Show where an adapter changed the model: how far it moves each layer's weight.",
    argument("name", nargs="?", metavar="NAME", completes="adapter", help="the active one if left out"),
    ON_MODEL,
    example="%lora inspect orders",
)
def inspect(options: argparse.Namespace, desk: Desk) -> object:
    """Inspects an adapter."""
    return desk.session.inspect(options.name, model=desk.chosen(options.model))


@verb("memory", "Measure what a model uses, by part.", ON_MODEL)
def memory(options: argparse.Namespace, desk: Desk) -> object:
    """Measures memory."""
    return MemoryReport(desk.session.memory(desk.chosen(options.model)))


@verb("doctor", "Say what is installed, what is wrong with it and what to install.")
def doctor(options: argparse.Namespace, desk: Desk) -> object:
    """Examines the installation and the front end."""
    return desk.session.doctor().with_checks(*front_end_checks(desk.shell))
