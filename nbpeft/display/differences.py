"""In which words two texts differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")
_ALIKE = 0.5
"""Share of common words from which on marks help; below it nearly everything would be marked."""

Runs = tuple[tuple[str, bool], ...]
"""Stretches of a text, and whether each is a change."""


def differences(text: str, reference: str) -> tuple[Runs, str]:
    """Returns what in a text differs from a reference, and how it relates in words.

    Returns:
        The text in runs; and ``same``, ``other answer`` (then nothing is marked) or the empty string.
    """
    plain = ((text, False),)
    if text.split() == reference.split():
        return plain, "same"
    new, old = _PIECES.findall(text), _PIECES.findall(reference)
    if _likeness(new, old) < _ALIKE:
        return plain, "other answer" if text and reference else ""
    return _runs(new, old), ""


def _runs(new: Sequence[str], old: Sequence[str]) -> Runs:
    """Returns one word alone between two changes counts with them: marks that small are hard to read."""
    codes = [code for code in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if code[3] < code[4]]
    runs: list[tuple[str, bool]] = []
    for place, (kind, _, _, start, end) in enumerate(codes):
        beside = codes[max(place - 1, 0)], codes[min(place + 1, len(codes) - 1)]
        changed = kind != "equal" or (end - start == 1 and all(code[0] != "equal" for code in beside))
        piece = "".join(new[start:end])
        if runs and runs[-1][1] == changed:
            runs[-1] = (runs[-1][0] + piece, changed)
        else:
            runs.append((piece, changed))
    return tuple(runs)


def _likeness(new: Sequence[str], old: Sequence[str]) -> float:
    """Share of common words; punctuation, of which JSON is full, counts only where there are no words."""
    words = [[piece for piece in pieces if piece[0].isalnum()] for pieces in (new, old)]
    if not all(words):
        words = [[piece for piece in pieces if not piece.isspace()] for pieces in (new, old)]
    return SequenceMatcher(None, words[1], words[0], autojunk=False).ratio()
