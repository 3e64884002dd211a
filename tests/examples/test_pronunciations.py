"""Words and their sounds: what is held out, and how answers are measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbpeft import examples
from nbpeft.errors import ConfigError

SHELTER = {"prompt": "s h e l t e r =", "completion": " SH EH L T ER"}


def test_no_held_out_word_is_learned_and_all_are_in_the_alphabet_of_the_dictionary() -> None:
    train, held_out = examples.pronunciations()
    assert (len(train), len(held_out)) == (1600, 48)
    words = [row["prompt"] for row in (*train, *held_out)]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"([a-z] ){4,7}=", word) for word in words)
    learned, asked = ({symbol for row in rows for symbol in row["completion"].split()} for rows in (train, held_out))
    assert asked <= learned and len(learned) == 39, "the 39 phonemes of the dictionary, without stress"


def test_the_same_seed_gives_the_same_rows() -> None:
    assert examples.pronunciations(20, 5, seed=3) == examples.pronunciations(20, 5, seed=3)
    assert examples.pronunciations(20, 5, seed=3) != examples.pronunciations(20, 5, seed=4)


def test_the_file_has_the_licence_of_the_dictionary() -> None:
    text = Path(examples.__file__).with_name("pronunciations.txt").read_text(encoding="utf-8")
    assert "Copyright (C) 1993-2015 Carnegie Mellon University" in text
    assert "Redistributions of source code must retain the above copyright" in text


@pytest.mark.parametrize(
    ("answer", "symbols"),
    [
        (" SH EH L T ER", 1),
        (" SH EH L T ER\n\nw e a k = W IY K", 1),
        (" SH EH L ER", 0.8),
        (" SH EH L T ER Z", 0.8),
        (" S EH L T AH", 0.6),
        (" sh eh l t er", 0),
        ("", 0),
        (" shelter is a word and not a list of sounds", 0),
    ],
)
def test_an_answer_is_measured_by_its_first_line(answer: str, symbols: float) -> None:
    assert examples.symbols_right(answer, SHELTER) == pytest.approx(symbols)
    assert examples.word_right(answer, SHELTER) is (symbols == 1)


@pytest.mark.parametrize(("train", "held_out"), [(-1, 0), (2.5, 0), (0, 5000), (1700, 200), ("3", 1)])
def test_impossible_numbers_of_rows(train: object, held_out: object) -> None:
    with pytest.raises(ConfigError, match=r"train|held_out"):
        examples.pronunciations(train, held_out)  # type: ignore[arg-type]
