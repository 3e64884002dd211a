"""The distinct answers or labels of rows, where they are few, and those that look like mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nbpeft.display.numbers import count
from nbpeft.errors import cut

Answers = tuple[tuple[str, int], ...]
"""(answer, number of rows) of each distinct answer, the most frequent first."""

_MOST = 24
"""The greatest number of distinct answers that are listed."""
_LONGEST = 60
_RARE = 20
"""An answer that looks like an empty cell is named if fewer than one row in so many has it."""
_GAPS = frozenset(("", "?", "n/a", "na", "nan", "null", "tbd", "todo"))
_AROUND = " \t\r\n.,;:!\"'"


class AnswerCounts:
    """Counts answers as long as there are few of them."""

    def __init__(self) -> None:
        self._counts: Counter[str] | None = Counter()

    def add(self, answer: str | None) -> None:
        """Counts one more answer; after None, which is too long for a label, or too many different ones, no more."""
        if self._counts is None:
            return
        if answer is None:
            self._counts = None
            return
        self._counts[answer] += 1
        if len(self._counts) > _MOST:
            self._counts = None

    @property
    def few(self) -> Answers:
        """The distinct answers; empty if there are many, or only one for each row or two."""
        counts = self._counts or Counter()
        return tuple(counts.most_common()) if 2 * len(counts) <= counts.total() else ()


def few_answers(answers: Iterable[str]) -> Answers:
    """The distinct answers, as ``AnswerCounts`` has them.

    Args:
        answers: the answer of each row; empty for none.
    """
    counts = AnswerCounts()
    for answer in filter(None, answers):
        counts.add(answer)
    return counts.few


def listed_answers(answers: Iterable[tuple[str, int]]) -> str:
    """Answers in quotes, each with its number of rows."""
    return ", ".join(f"{cut(answer, _LONGEST)!r} {count(rows)}" for answer, rows in answers)


def odd_answers(answers: Answers) -> tuple[str, ...]:
    """Lines about answers that differ in case, blanks or punctuation alone, and about rare ones like empty cells.

    Args:
        answers: the distinct answers.
    """
    alike: dict[str, list[tuple[str, int]]] = {}
    for answer, rows in answers:
        alike.setdefault(answer.casefold().strip(_AROUND), []).append((answer, rows))
    same = [listed_answers(group) for key, group in alike.items() if len(group) > 1 and key not in _GAPS]
    total = sum(rows for _, rows in answers)
    gaps = [(answer, rows) for answer, rows in answers if _is_gap(answer) and _RARE * rows < total]
    lines = [f"answers that differ in case, blanks or punctuation alone: {'; '.join(same)}"] if same else []
    return (*lines, *([f"answers like those of empty cells: {listed_answers(gaps)}"] if gaps else []))


def _is_gap(answer: str) -> bool:
    return answer.casefold().strip(_AROUND) in _GAPS
