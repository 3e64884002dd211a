"""Choosing which adapters are active, and how strongly."""

from __future__ import annotations

from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ADAPTER, ON_MODEL, session_command

session_command(
    "use",
    "Switch to one adapter, or to several whose deltas add up.",
    argument("names", nargs="+", metavar="NAME", completes="adapter", help="one or several"),
    ON_MODEL,
    example="%lora use sql",
)
session_command("off", "Switch all adapters off: the base model runs alone.", ON_MODEL)
session_command("on", "Switch the adapters on again.", ON_MODEL)
session_command(
    "scale",
    "Set the factor on what an adapter adds; 1 is how it was trained.",
    ADAPTER,
    argument("factor", type=float, metavar="FACTOR", help="0 is off, 1 as trained"),
    ON_MODEL,
    method="set_scale",
    example="%lora scale sql 0.7",
)
