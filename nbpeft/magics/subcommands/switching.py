"""Choosing the active adapters, and their scale."""

from __future__ import annotations

from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ADAPTER, ON_MODEL, session_command
from nbpeft.names import BASE

session_command(
    "use",
    "Activate one adapter, several whose deltas are summed, or base: the model without adapters.",
    argument(
        "names",
        nargs="+",
        metavar="NAME",
        completes="adapter",
        words=(BASE,),
        help="one or several adapters; base disables all until others are used",
    ),
    ON_MODEL,
    example="%lora use sql",
)
session_command(
    "scale",
    "Set the factor by which an adapter's delta is multiplied; 1 is as trained.",
    ADAPTER,
    argument("factor", type=float, metavar="FACTOR", help="0 is off, 1 as trained"),
    ON_MODEL,
    example="%lora scale sql 0.7",
)
