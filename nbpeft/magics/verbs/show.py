"""Panels, and what is wrong with the installation."""

from __future__ import annotations

import argparse

from nbpeft.magics.desk import Desk
from nbpeft.magics.front_end import front_end_checks
from nbpeft.magics.panels import adapters_panel
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, verb
from nbpeft.session import MemoryReport


@verb(
    "panel",
    "Show the adapters with buttons to switch, save and delete them.",
    argument("name", nargs="?", metavar="MODEL", completes="model", help="the current one if left out"),
)
def panel(options: argparse.Namespace, desk: Desk) -> object:
    """Shows the adapters panel."""
    model = desk.chosen(options.name)
    name = model if isinstance(model, str) else None if model is None else desk.session.watch(model, name=options.name)
    return adapters_panel(desk, name)


@verb("memory", "Measure what a model uses, by part.", ON_MODEL)
def memory(options: argparse.Namespace, desk: Desk) -> object:
    """Measures memory."""
    return MemoryReport(desk.session.memory(desk.chosen(options.model)))


@verb("doctor", "Say what is installed, what is wrong with it and what to install.")
def doctor(options: argparse.Namespace, desk: Desk) -> object:
    """Examines the installation and the front end."""
    return desk.session.doctor().with_checks(*front_end_checks(desk.shell))
