"""Refuses regular expressions in configs whose matching could take too long (catastrophic backtracking).

Config files may come from untrusted sources, so each expression is checked before its first match.
Python's ``re`` matches by backtracking: it tries one way after another. The number of ways is estimated
from the parsed expression. A repeat multiplies it if the next character does not decide whether the repeat
continues; a repeat inside a repeat raises it to a power.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nbpeft.errors import ConfigError, shown

WHOLE = "{}"
"""An expression for a whole path."""
ENDING = r"(.*\.)?({})$"
"""An expression for the end of a path, as PEFT reads ``rank_pattern``."""
ANYWHERE = r".*?({})"
"""An expression for any part of a path."""
LAYER_INDEX = r"(?:^|.*?\.){}\.(\d+)\."
"""An expression for the name before a layer's index, as PEFT reads ``layers_pattern``."""

_codes: Any = importlib.import_module("re._constants")
_parser: Any = importlib.import_module("re._parser")

_MOST_STEPS = 300_000
"""Allowed steps for one path and all expressions of a config; a few milliseconds."""
_LEAST_STEPS = 150
"""Steps counted for any expression, for compiling it."""
_LONGEST = 50_000
"""Characters of the longest expression that is accepted."""
_LENGTH = 64
"""Characters of a long module path."""
_FEW = 6
"""Roughly how often one character occurs in a path; a repeat that matches several characters counts more."""
_ALTERNATIVES = 20
"""Number of alternatives (``|``) that take about as long as one step of a repeat."""
_OTHER = "é"
"""Represents every character that is not ASCII."""
_LETTERS = frozenset(map(chr, range(128))) | {_OTHER}
_AFTER = frozenset({"after"})
"""A marker for what follows an expression: if it is among the expression's first characters, it can match nothing."""
_ENDLESS = float("inf")

Letters = frozenset[str]


def check_patterns(patterns: Iterable[tuple[str, str, str]]) -> None:
    """Refuses expressions that are invalid, or whose matching could take too long.

    Args:
        patterns: (field, expression, template it is inserted into: ``WHOLE``, ``ENDING``, ``ANYWHERE`` or
            ``LAYER_INDEX``).

    Raises:
        ConfigError: an expression is invalid, or all together could take too long.
    """
    total = 0.0
    for field, pattern, around in patterns:
        total += max(_steps(field, pattern, around), _LEAST_STEPS)
        if total > _MOST_STEPS:
            raise ConfigError(
                f"{field}: matching {shown(pattern)} could take forever; write it without a repeat inside a "
                "repeat, without backreferences and with fewer wildcards, or list the names",
                field=field,
            )


def _steps(field: str, pattern: str, around: str) -> float:
    """An estimate of the largest number of steps that matching takes, possibly infinite."""
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        raise ConfigError(f"{field}: {shown(pattern)} is not a regular expression, or is too long", field=field)
    try:
        # Compiled too, because some errors are only found then; ``re`` caches the result for the later match.
        re.compile(around.format(pattern))
        parsed = _parser.parse(around.format(pattern))
        reading = _Reading()
        return reading.sequence(parsed, frozenset(), 0)[0] * (1 + reading.alternatives // _ALTERNATIVES)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{field} is not a regular expression: {reason} in {shown(pattern)}", field=field) from None


class _Reading:
    """Analyses a parsed expression from its end, since what follows a repeat decides how it can backtrack.

    Each method takes the characters that can follow (``behind``) and the number of repeats around the part
    (``loops``). It returns the number of ways to match, and the characters that can come first, which
    include those of ``behind`` if the part can match nothing.
    """

    def __init__(self) -> None:
        self.alternatives = 0

    def sequence(self, items: Any, behind: Letters, loops: int) -> tuple[float, Letters]:
        ways = 1.0
        for code, value in reversed(list(items)):
            more, behind = self._item(code, value, behind, loops)
            ways *= more
        return ways, behind

    def _item(self, code: Any, value: Any, behind: Letters, loops: int) -> tuple[float, Letters]:
        letters = _letters(code, value)
        if letters is not None:
            return 1.0, letters
        if code in (_codes.AT, _codes.FAILURE):
            return 1.0, behind
        if code in (_codes.ASSERT, _codes.ASSERT_NOT):
            return self.sequence(value[1], _LETTERS, loops)[0], behind
        if code in (_codes.SUBPATTERN, _codes.ATOMIC_GROUP):
            return self.sequence(value[-1] if code is _codes.SUBPATTERN else value, behind, loops)
        if code is _codes.BRANCH:
            return self._branch(value[1], behind, loops)
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT, _codes.POSSESSIVE_REPEAT):
            least, most, body = value
            return self._repeat(least, most, body, behind, loops)
        return _ENDLESS, behind  # a backreference

    def _branch(self, branches: Any, behind: Letters, loops: int) -> tuple[float, Letters]:
        self.alternatives += len(branches)
        read = [self.sequence(branch, behind, loops) for branch in branches]
        first: Letters = frozenset().union(*(letters for _, letters in read))
        are_disjoint = sum(len(letters) for _, letters in read) == len(first)
        # Of plain names at most one or two can match, whichever characters they share.
        named = [all(code is _codes.LITERAL for code, _ in branch) for branch in branches]
        if are_disjoint:  # the first character decides which branch can match
            return max(ways for ways, _ in read), first
        if loops:
            return sum(ways for ways, _ in read), first
        return sum(ways for (ways, _), plain in zip(read, named, strict=True) if not plain) + any(named), first

    def _repeat(self, least: int, most: int, body: Any, behind: Letters, loops: int) -> tuple[float, Letters]:
        most = min(int(most), _LENGTH)
        least = min(int(least), most)
        if most == 0:
            return 1.0, behind
        if most == 1:
            ways, first = self.sequence(body, behind, loops)
            return (ways, first) if least else (ways + bool(first & behind), first | behind)
        letters = _single(body)
        if letters is not None:
            rest = self._choices(least, most, letters, behind)
            return rest, letters if least else letters | behind
        if loops:
            return _ENDLESS, behind
        first = self.sequence(body, _AFTER, loops)[1]
        if first & _AFTER:
            return _ENDLESS, behind  # a repeat of something that can match nothing
        ways, _ = self.sequence(body, first | behind if least < most else behind, loops + 1)
        return min(ways, 1e9) ** most * self._choices(least, most, first, behind), first if least else first | behind

    @staticmethod
    def _choices(least: int, most: int, letters: Letters, behind: Letters) -> float:
        """Number of positions at which a repeat over some characters can end."""
        if least == most or (behind and not letters & behind) or (not behind and letters >= _LETTERS - {"\n"}):
            return 1.0
        return float(min(most - least + 1, _FEW + len(letters & behind)))


def _single(items: Any) -> Letters | None:
    """The characters of an expression that matches exactly one character; None for any other expression."""
    if len(items) != 1:
        return None
    code, value = items[0]
    return _single(value[-1]) if code is _codes.SUBPATTERN else _letters(code, value)


def _letters(code: Any, value: Any) -> Letters | None:
    """The characters that an item for one character matches, in both cases; None for any other item."""
    if code is _codes.ANY:
        return _LETTERS - {"\n"}
    if code is _codes.LITERAL:
        return _both_cases({chr(value) if value < 128 else _OTHER})
    if code is _codes.NOT_LITERAL:
        return _LETTERS - {chr(value)}
    if code is not _codes.IN:
        return None
    found: set[str] = set()
    negated = value[0][0] is _codes.NEGATE
    for kind, item in value[1:] if negated else value:
        if kind is _codes.LITERAL:
            found.add(chr(item) if item < 128 else _OTHER)
        elif kind is _codes.RANGE:
            found.update(map(chr, range(item[0], min(item[1], 127) + 1)))
            found.update({_OTHER} if item[1] > 127 else ())
        else:
            found.update(_CATEGORIES.get(str(item), _LETTERS))
    return _LETTERS - (found - {_OTHER}) if negated else _both_cases(found)


def _both_cases(letters: Iterable[str]) -> Letters:
    # Always both cases, even if the expression is case-sensitive: too many characters only make the check stricter.
    return frozenset(case for letter in letters for case in (letter, letter.swapcase())) & _LETTERS


def _category(test: Any) -> Letters:
    return frozenset(letter for letter in _LETTERS if test(letter))


_CATEGORIES: Mapping[str, Letters] = {
    "CATEGORY_DIGIT": _category(str.isdigit) | {_OTHER},
    "CATEGORY_NOT_DIGIT": _category(lambda letter: not letter.isdigit()),
    "CATEGORY_SPACE": _category(str.isspace) | {_OTHER},
    "CATEGORY_NOT_SPACE": _category(lambda letter: not letter.isspace()),
    "CATEGORY_WORD": _category(lambda letter: letter.isalnum() or letter == "_"),
    "CATEGORY_NOT_WORD": _category(lambda letter: not (letter.isalnum() or letter == "_")) | {_OTHER},
}
