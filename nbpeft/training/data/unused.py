"""Parts of rows that are not trained on: counted while the rows are read, and reported before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Unused = tuple[str, str]
"""(reason, name) of a part that is not trained on."""

COLUMNS = "columns not used"
MESSAGES = "not used"
UNPRINTED = "not printed by the chat template, so not trained on"
EMPTY = "learned although empty"
UNTOKENISED = "without a token, so their tags are not learned"


class UnusedParts:
    """The parts of rows that are not trained on, with the number of rows that have each."""

    def __init__(self) -> None:
        self._counts: Counter[Unused] = Counter()

    def add(self, parts: Iterable[Unused]) -> list[Unused]:
        """Counts the unused parts of one more row; returns those that no earlier row had."""
        row_parts = dict.fromkeys(parts)
        new = [part for part in row_parts if part not in self._counts]
        for part in row_parts:
            self._counts[part] += 1
        return new

    def __contains__(self, part: Unused) -> bool:
        return part in self._counts

    def lines(self, row_count: int | None = None) -> tuple[str, ...]:
        """A line for each reason, with the names of the parts.

        Args:
            row_count: the number of rows, to report how many of them have a part that not all have; None if unknown.
        """
        by_reason: dict[str, list[str]] = {}
        for (reason, name), count in sorted(self._counts.items()):
            some = row_count is not None and count < row_count
            by_reason.setdefault(reason, []).append(f"{name} ({count:,} of {row_count:,} rows)" if some else name)
        return tuple(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())


def line_of(part: Unused) -> str:
    """A line about one part."""
    return f"{part[0]}: {part[1]}"
