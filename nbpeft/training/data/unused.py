"""What rows hold that is not trained on: counted while they are read, and said before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Unused = tuple[str, str]
"""Why something is not trained on, and its name."""

COLUMNS = "columns not used"
MESSAGES = "not used"
UNPRINTED = "not printed by the chat template, so not trained on"
EMPTY = "empty"


class UnusedParts:
    """What some rows hold that is not trained on."""

    def __init__(self) -> None:
        self._counts: Counter[Unused] = Counter()

    def add(self, parts: Iterable[Unused]) -> list[Unused]:
        """Counts what one more row holds. Returns what no row held before."""
        held = dict.fromkeys(parts)
        new = [part for part in held if part not in self._counts]
        for part in held:
            self._counts[part] += 1
        return new

    def __contains__(self, part: Unused) -> bool:
        return part in self._counts

    def lines(self, row_count: int | None = None) -> tuple[str, ...]:
        """A line for each reason, with the names.

        Args:
            row_count: of the rows, so that what only some of them hold is said to be in so many; None if unknown.
        """
        found: dict[str, list[str]] = {}
        for (reason, name), count in sorted(self._counts.items()):
            some = row_count is not None and count < row_count
            found.setdefault(reason, []).append(f"{name} ({count:,} of {row_count:,} rows)" if some else name)
        return tuple(f"{reason}: {', '.join(names)}" for reason, names in found.items())


def line_of(part: Unused) -> str:
    """One part alone."""
    return f"{part[0]}: {part[1]}"
