"""A task on public data: how English words sound, from the CMU Pronouncing Dictionary.

``pronunciations.txt`` beside this file has 1,800 common words, and the licence of the dictionary.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from nbpeft.errors import ConfigError
from nbpeft.examples.tasks import Row, check_number

_FILE = Path(__file__).with_name("pronunciations.txt")


def pronunciations(train: int = 1600, held_out: int = 48, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Spelled words and their sounds: ``b r e a t h =`` is continued by ``B R EH TH``.

    The words are common ones of four to seven letters from the `CMU Pronouncing Dictionary
    <http://www.speech.cs.cmu.edu/cgi-bin/cmudict>`_. No word is in both lists.

    Args:
        train: number of training rows.
        held_out: number of held-out rows.
        seed: seed of the random choice.

    Returns:
        The training rows and the held-out rows.

    Raises:
        ConfigError: there are not so many words.
    """
    lines = list(_words())
    for name, number in (("train", train), ("held_out", held_out)):
        check_number(name, number, len(lines))
    if train + held_out > len(lines):
        raise ConfigError(f"train + held_out = {train + held_out:,}: there are {len(lines):,} words", field="train")
    random.Random(seed).shuffle(lines)
    rows: list[Row] = [{"prompt": f"{' '.join(word)} =", "completion": f" {sounds}"} for word, sounds in lines]
    return rows[held_out : held_out + train], rows[:held_out]


def word_right(answer: str, row: Row) -> bool:
    """A metric for ``pronunciations``: whether the first line of an answer is the pronunciation."""
    return _first_line(answer) == row["completion"].split()


def symbols_right(answer: str, row: Row) -> float:
    """A metric for ``pronunciations``: one minus the edit distance per symbol of the pronunciation, and at least 0.

    The distance is the number of symbols to insert, remove or replace in the first line of the answer.
    """
    wanted = row["completion"].split()
    return max(0.0, 1 - _distance(_first_line(answer), wanted) / len(wanted))


def _first_line(answer: str) -> list[str]:
    """The symbols of an answer; what a model writes on further lines is a continuation, such as the next example."""
    return answer.partition("\n")[0].split()


def _distance(first: list[str], second: list[str]) -> int:
    """The Levenshtein distance."""
    row = list(range(len(second) + 1))
    for count, symbol in enumerate(first, 1):
        corner, row[0] = row[0], count
        for place, other in enumerate(second, 1):
            corner, row[place] = row[place], min(corner + (symbol != other), row[place] + 1, row[place - 1] + 1)
    return row[-1]


@cache
def _words() -> tuple[tuple[str, str], ...]:
    """(word, pronunciation) of each line that is not the licence."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines if not line.startswith(";;;"))
    return tuple((word, sounds) for word, sounds in pairs)
