"""Splits a magic's line into words.

Spaces separate words, except inside quotes and brackets. Quotes around a word (or around the value of
``--option=``) are removed; quotes inside a word stay, so ``ds["train"]`` and ``targets=["q", "v"]``
need no escaping. A backslash is an ordinary character. ``{name}`` or ``$name`` is a variable
of the notebook only if it is the whole word, the whole value after ``=``, or the first part of a path. A word that
begins with ``#`` begins a comment, as in Python; ``#`` inside a word or in quotes does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nbpeft.errors import CellError

_REFERENCE = re.compile(r"\{([^\W\d]\w*)\}|\$([^\W\d]\w*)")
_OPTION_VALUE = re.compile(r"--[\w-]+=")
_SHELL = ("In", "Out", "exit", "get_ipython", "open", "quit")
"""The names that IPython itself adds to a notebook's variables."""
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Word:
    """One word of a line.

    Attributes:
        text: the word without the quotes around it.
        start: 0-based column of its first character, quotes included.
        end: column after its last character.
        quoted: whether quotes were removed; then ``$name`` is not replaced.
    """

    text: str
    start: int
    end: int
    quoted: bool = False


def reference(text: str) -> str | None:
    """``name`` for ``{name}`` and ``$name``; None for any other text."""
    match = _REFERENCE.fullmatch(text)
    return (match.group(1) or match.group(2)) if match else None


def folder(text: str) -> tuple[str, str] | None:
    """``("name", "/rest")`` for a path that begins with a variable; None for any other text."""
    match = _REFERENCE.match(text)
    if match is None or text[match.end() : match.end() + 1] not in ("/", "\\"):
        return None
    return match.group(1) or match.group(2), text[match.end() :]


def option_value(text: str) -> bool:
    """Whether a text is an option with its value, ``--name=value``."""
    return _OPTION_VALUE.match(text) is not None


def own_names(namespace: Iterable[str]) -> list[str]:
    """The user's own variable names, as suggestions for a name that is not defined."""
    return [name for name in namespace if not name.startswith("_") and name not in _SHELL]


def tokenize(line: str) -> list[Word]:
    """Split a line into words.

    Raises:
        CellError: a quote is not closed; ``column`` is where it opens.
    """
    words, at = [], 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        if line[at] == "#":
            at = (line + "\n").index("\n", at)
            continue
        word = _word(line, at, brackets=True) or _word(line, at, brackets=False)
        if word is None:
            raise CellError("a quote is not closed", column=_open_quote(line, at))
        words.append(word)
        at = word.end
    return words


def without_comment(line: str) -> str:
    """Return a line up to the end of its last word; the line itself if a quote in it is not closed."""
    try:
        words = tokenize(line)
    except CellError:
        return line
    return line[: words[-1].end] if words else ""


def quoted(text: str) -> str:
    """Return a text as one word of a line, in quotes if it needs them."""
    for quote in ("", '"', "'"):
        try:
            words = tokenize(f"{quote}{text}{quote}")
        except CellError:
            continue
        if [word.text for word in words] == [text] and (quote or not text.startswith(("-", "{", "$"))):
            return f"{quote}{text}{quote}"
    return f'"{text}"'


def _word(line: str, start: int, *, brackets: bool) -> Word | None:
    """The word at ``start``, or None when a quote or bracket in it is not closed."""
    text: list[str] = []
    depth, at, quoted = 0, start, False
    while at < len(line) and (depth or not line[at].isspace()):
        char = line[at]
        if char in "\"'" and (depth or not _apostrophe(line, at, start)):
            close = line.find(char, at + 1)
            if close < 0:
                return None
            strip = depth == 0 and (at == start or quoted or bool(_OPTION_VALUE.fullmatch("".join(text))))
            quoted = quoted or strip
            text.append(line[at + 1 : close] if strip else line[at : close + 1])
            at = close + 1
            continue
        if brackets:
            depth += (char in _OPEN) - (char in _CLOSE and depth > 0)
        text.append(char)
        at += 1
    return None if depth else Word("".join(text), start, at, quoted)


def _apostrophe(line: str, at: int, start: int) -> bool:
    """Whether a quote is an apostrophe inside a word, as in ``Ana's``, and opens no quoted text."""
    return at > start and line[at - 1].isalnum() and line.find(line[at], at + 1) < 0


def _open_quote(line: str, start: int) -> int:
    return next((at for at in range(start, len(line)) if line[at] in "\"'"), start)
