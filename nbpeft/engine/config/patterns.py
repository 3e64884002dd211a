"""Regular expressions of configs, refused where matching one could take for ever.

Python's ``re`` tries one way after another to match a text. How many there can be is estimated from
the parsed expression: a repeat that cannot tell from the next letter whether it goes on multiplies
them, and one inside another raises them to a power. A config file comes from anybody, so what is
too much is refused before the first match.
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
"""For one path and all expressions of a config; a few milliseconds."""
_LEAST_STEPS = 150
"""What any expression costs, being compiled."""
_LONGEST = 50_000
_LENGTH = 64
"""Letters of a long path."""
_FEW = 6
"""How often one letter comes in it, or so; each further one comes once more."""
_ALTERNATIVES = 20
"""As many alternatives are tried in about the time of one repeat."""
_OTHER = "é"
"""Stands for every letter that is not ASCII."""
_LETTERS = frozenset(map(chr, range(128))) | {_OTHER}
_AFTER = frozenset({"after"})
"""Stands for what comes behind, where it is asked whether an expression can be empty."""
_ENDLESS = float("inf")

Letters = frozenset[str]


def check_patterns(patterns: Iterable[tuple[str, str, str]]) -> None:
    """Refuses expressions that cannot be read, or could take for ever.

    Args:
        patterns: (field, expression, what it stands in: ``WHOLE``, ``ENDING``, ``ANYWHERE`` or ``LAYER_INDEX``).

    Raises:
        ConfigError: one cannot be read, or all together take too long.
    """
    total = 0.0
    for field, pattern, around in patterns:
        total += max(_steps(field, pattern, around), _LEAST_STEPS)
        if total > _MOST_STEPS:
            raise ConfigError(
                f"{field}: matching {shown(pattern)} could take for ever; write it without a repeat inside a "
                "repeat, without backreferences and with fewer wildcards, or list the names",
                field=field,
            )


def _steps(field: str, pattern: str, around: str) -> float:
    """About how many steps matching takes at most, infinity included."""
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        raise ConfigError(f"{field}: {shown(pattern)} is no regular expression, or far too long", field=field)
    try:
        # Compiled here too, because some mistakes come out only then; ``re`` keeps it for later.
        re.compile(around.format(pattern))
        parsed = _parser.parse(around.format(pattern))
        reading = _Reading()
        return reading.sequence(parsed, frozenset(), 0)[0] * (1 + reading.alternatives // _ALTERNATIVES)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{field} is not a regular expression: {reason} in {shown(pattern)}", field=field) from None


class _Reading:
    """Reads a parsed expression from its end, since what comes behind decides what a repeat can do.

    Each method returns the number of ways to match, and the letters that can come first; those
    behind are among them where the part can be empty.
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
        told_apart = sum(len(letters) for _, letters in read) == len(first)
        # Of plain names at most one or two fit, whatever letter they share.
        named = [all(code is _codes.LITERAL for code, _ in branch) for branch in branches]
        if told_apart:
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
            return _ENDLESS, behind  # it repeats what can be empty
        ways, _ = self.sequence(body, first | behind if least < most else behind, loops + 1)
        return min(ways, 1e9) ** most * self._choices(least, most, first, behind), first if least else first | behind

    @staticmethod
    def _choices(least: int, most: int, letters: Letters, behind: Letters) -> float:
        """In how many places a repeat of some letters can end."""
        if least == most or (behind and not letters & behind) or (not behind and letters >= _LETTERS - {"\n"}):
            return 1.0
        return float(min(most - least + 1, _FEW + len(letters & behind)))


def _single(items: Any) -> Letters | None:
    """The letters of an expression that is exactly one of them."""
    if len(items) != 1:
        return None
    code, value = items[0]
    return _single(value[-1]) if code is _codes.SUBPATTERN else _letters(code, value)


def _letters(code: Any, value: Any) -> Letters | None:
    """The letters that one place takes, upper or lower case; None for everything else."""
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
    # Whether the expression minds the case does not matter: too many letters only make it stricter.
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
