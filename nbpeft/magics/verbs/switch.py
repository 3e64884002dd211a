"""Choosing which adapters act, and how strongly."""

from __future__ import annotations

import argparse

from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, verb


@verb(
    "use",
    "Switch to one adapter, or to several whose deltas add up.",
    argument("names", nargs="+", metavar="NAME", completes="adapter", help="one or several"),
    ON_MODEL,
    example="%lora use sql",
)
def use(options: argparse.Namespace, desk: Desk) -> object:
    """Switches."""
    return desk.session.use(options.names, model=desk.chosen(options.model))


@verb("off", "Let only the base model act.", ON_MODEL)
def off(options: argparse.Namespace, desk: Desk) -> object:
    """Switches adapters off."""
    return desk.session.off(model=desk.chosen(options.model))


@verb("on", "Let the adapters act again.", ON_MODEL)
def on(options: argparse.Namespace, desk: Desk) -> object:
    """Switches adapters on."""
    return desk.session.on(model=desk.chosen(options.model))


@verb(
    "scale",
    "Set the factor on what an adapter adds; 1 is how it was trained.",
    argument("name", metavar="NAME", completes="adapter", help="the adapter"),
    argument("factor", type=float, metavar="FACTOR", help="0 is off, 1 as trained"),
    ON_MODEL,
    example="%lora scale sql 0.7",
)
def scale(options: argparse.Namespace, desk: Desk) -> object:
    """Scales an adapter."""
    return desk.session.set_scale(options.name, options.factor, model=desk.chosen(options.model))
