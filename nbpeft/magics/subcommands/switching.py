"""Choosing the active adapters, and their scale."""

from __future__ import annotations

from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ADAPTER, ON_MODEL, session_command

session_command(
    "use",
    "Activate one adapter, or several whose deltas are summed.",
    argument("names", nargs="+", metavar="NAME", completes="adapter", help="one or several adapters"),
    ON_MODEL,
    example="%lora use sql",
)
session_command("off", "Disable all adapters: the base model runs alone.", ON_MODEL)
session_command("on", "Enable the adapters again.", ON_MODEL)
session_command(
    "scale",
    "Set the factor by which an adapter's delta is multiplied; 1 is as trained.",
    ADAPTER,
    argument("factor", type=float, metavar="FACTOR", help="0 is off, 1 as trained"),
    ON_MODEL,
    example="%lora scale sql 0.7",
)
