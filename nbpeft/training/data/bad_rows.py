"""Rows that cannot be read: counted by reason, refused in one line, or left out if that was requested.

A row that can be read but has nothing to train on is another matter: it is always left out, and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nbpeft.errors import TrainingError, few

GIVE_UP = 100
"""The number of bad rows at the start after which the others are not read any more."""
_WHERE = re.compile(r"^Row \d+:? ")
_VALUES = re.compile(r"\([^()]*\)|(?!^)'[^']*'|\d+")
_NAMED = 5
SKIP = "Such rows are left out on request (skip_bad=…)."


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
