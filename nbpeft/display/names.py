"""Short names of adapters for narrow places."""

from __future__ import annotations

LONGEST = 26
"""Most characters of a name on a button."""


def shortened(name: str, longest: int = LONGEST) -> str:
    """Returns a name, shortened by an ellipsis in the middle: names of one experiment differ at the end.

    Args:
        name: the name.
        longest: most characters of the result.
    """
    if len(name) <= longest:
        return name
    end = 2 * (longest - 1) // 3
    return f"{name[: longest - 1 - end]}…{name[-end:]}"
