"""Finds the words in which two texts differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")
_ALIKE = 0.5
"""Similarity below which no differences are marked, because nearly everything would be."""

Runs = tuple[tuple[str, bool], ...]
"""(span of a text, whether it differs)."""


def differences(text: str, reference: str) -> tuple[Runs, str]:
    """Marks the words of a text that differ from a reference.

    Returns:
        The text in runs; and ``same``, ``differs`` (nothing is marked then) or the empty string.
    """
    plain = ((text, False),)
    if text.split() == reference.split():
        return plain, "same"
    new, old = _PIECES.findall(text), _PIECES.findall(reference)
    if _likeness(new, old) < _ALIKE:
        return plain, "differs" if text and reference else ""
    return _runs(new, old), ""


def _runs(new: Sequence[str], old: Sequence[str]) -> Runs:
    """Returns the new text in runs; a single equal word between two changes counts as changed, for readability."""
    codes = [code for code in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if code[3] < code[4]]
    runs: list[tuple[str, bool]] = []
    for place, (kind, _, _, start, end) in enumerate(codes):
        neighbours = codes[max(place - 1, 0)], codes[min(place + 1, len(codes) - 1)]
        changed = kind != "equal" or (end - start == 1 and all(code[0] != "equal" for code in neighbours))
        piece = "".join(new[start:end])
        if runs and runs[-1][1] == changed:
            runs[-1] = (runs[-1][0] + piece, changed)
        else:
            runs.append((piece, changed))
    return tuple(runs)


def _likeness(new: Sequence[str], old: Sequence[str]) -> float:
    """Returns the similarity of the words, 0 to 1; punctuation, frequent in JSON, counts only if there are no words."""
    words = [[piece for piece in pieces if piece[0].isalnum()] for pieces in (new, old)]
    if not all(words):
        words = [[piece for piece in pieces if not piece.isspace()] for pieces in (new, old)]
    return SequenceMatcher(None, words[1], words[0], autojunk=False).ratio()
