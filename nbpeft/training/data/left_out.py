"""Rows that cannot be read, and parts of rows that are not trained on: counted by reason, and reported.

Rows that cannot be read are refused in one line, or left out if that was requested. A row that can be read but has
nothing to train on is always left out, and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbpeft.errors import TrainingError, few

GIVE_UP = 100
"""The number of bad rows at the start after which the others are not read any more."""
_WHERE = re.compile(r"^Row \d+:? ")
_VALUES = re.compile(r"\([^()]*\)|(?!^)'[^']*'|\d+")
_NAMED = 5
SKIP = "Such rows are left out on request (skip_bad=…)."

Unused = tuple[str, str]
"""(reason, name) of a part that is not trained on."""

COLUMNS = "columns not used"
MESSAGES = "not used"
UNPRINTED = "not printed by the chat template, so not trained on"
EMPTY = "learned although empty"
UNTOKENISED = "without a token, so their tags are not learned"


@dataclass(frozen=True)
class Unreadable:
    """A row of a file that cannot be parsed.

    Attributes:
        why: the file, the line, and what is wrong.
    """

    why: str


def reason_of(error: TrainingError) -> str:
    """What is wrong with a row, from the error that names its number."""
    return _WHERE.sub("", str(error)).rstrip(".")


def kind_of(reason: str) -> str:
    """A reason without its numbers, quoted texts (but a column it begins with) and brackets; alike for similar rows."""
    return _VALUES.sub("", reason)


def refusal(found: Sequence[tuple[int, TrainingError]], total: int, *, can_skip: bool) -> TrainingError:
    """The error for rows that cannot be read.

    Args:
        found: (number, error) of each.
        total: the number of rows that were read.
        can_skip: whether the command can leave them out.
    """
    number, error = found[0]
    whole = len(found) == total
    hint = f" {SKIP}" if can_skip and not whole else ""
    details = {"index": number, "bad": len(found)}
    if len(found) == 1:
        return TrainingError(f"{str(error).rstrip('.')}.{hint}" if hint else str(error), **details)
    first: dict[str, str] = {}
    reasons = [(at, reason_of(error)) for at, error in found]
    named = [(at, first.setdefault(kind_of(reason), reason)) for at, reason in reasons]
    which = named_rows(named, 3)
    end = "" if which.endswith("?") else "."
    return TrainingError(
        f"{'None of the' if whole else f'{len(found):,} of'} {total:,} rows {'can' if whole else 'cannot'} be read: "
        f"{which}{end}{hint}",
        **details,
    )


def named_rows(left_out: Sequence[tuple[int, str]], count: int = _NAMED) -> str:
    """Rows by number with the reason, as text: ``rows 3, 8: nothing to learn``.

    Args:
        left_out: (number, reason) of each row.
        count: the greatest number of rows that are named for one reason.
    """
    parts = []
    for reason, times in Counter(reason for _, reason in left_out).items():
        numbers = [str(number) for number, why in left_out if why == reason]
        parts.append(f"{'row' if times == 1 else 'rows'} {few(numbers, count, quoted=False)}: {reason}")
    return "; ".join(parts)


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
