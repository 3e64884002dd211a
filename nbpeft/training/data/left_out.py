"""Names rows by number and reason in messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nbpeft.errors import few

_NAMED = 5


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
