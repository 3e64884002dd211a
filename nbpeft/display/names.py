"""Names of adapters where there is little room."""

from __future__ import annotations

LONGEST = 26
"""Letters of a name on a button."""


def shortened(name: str, longest: int = LONGEST) -> str:
    """Returns a name with an ellipsis in its middle: those of one experiment differ at the end."""
    if len(name) <= longest:
        return name
    end = 2 * (longest - 1) // 3
    return f"{name[: longest - 1 - end]}…{name[-end:]}"
