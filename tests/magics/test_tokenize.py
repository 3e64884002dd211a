from __future__ import annotations

import pytest
from hypothesis import strategies as st

from nbpeft.errors import CellError
from nbpeft.magics.tokenize import reference, tokenize
from tests.untimed import given


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  use   sql\tchat ", ["use", "sql", "chat"]),
        ('load "my folder/sql" --name x', ["load", "my folder/sql", "--name", "x"]),
        ("load 'my folder'/sql", ["load", "my folder/sql"]),
        ('--name="my adapter"', ["--name=my adapter"]),
        ('--data ds["train split"]', ["--data", 'ds["train split"]']),
        ('target_modules=["q_proj", "v_proj"] r=8', ['target_modules=["q_proj", "v_proj"]', "r=8"]),
        (r"target_modules=.*\.(q|v)_proj\d{2}", [r"target_modules=.*\.(q|v)_proj\d{2}"]),
        (r"load C:\models\sql", ["load", r"C:\models\sql"]),
        ("add Ana's", ["add", "Ana's"]),
        ("load a(b c", ["load", "a(b", "c"]),
        ('""', [""]),
    ],
)
def test_words_are_what_a_person_means(line: str, words: list[str]) -> None:
    assert [word.text for word in tokenize(line)] == words


def test_words_know_their_columns() -> None:
    first, second = tokenize("  use 'a b'")
    assert (first.start, first.end) == (2, 5)
    assert (second.start, second.end, second.quoted) == (6, 11, True)


@pytest.mark.parametrize("line", ['load "folder', "--data ds['train", "'"])
def test_an_open_quote_is_pointed_at(line: str) -> None:
    with pytest.raises(CellError, match="not closed") as caught:
        tokenize(line)
    assert caught.value.column is not None
    assert line[caught.value.column] in "\"'"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{rank}", "rank"),
        ("$rank", "rank"),
        ("{2}", None),
        ("a{rank}", None),
        ("$rank$", None),
        ("{a.b}", None),
        ("rank", None),
        ("{}", None),
        ("{größe}", "größe"),
    ],
)
def test_a_variable_is_the_whole_word(text: str, name: str | None) -> None:
    assert reference(text) == name


def test_quotes_keep_a_dollar_as_it_is() -> None:
    assert [(word.text, word.quoted) for word in tokenize("'$rank' $rank")] == [("$rank", True), ("$rank", False)]


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(line: str) -> None:
    try:
        words = tokenize(line)
    except CellError as error:
        assert "\n" not in str(error)
        return
    assert all(0 <= word.start < word.end <= len(line) for word in words)
    assert [word.start for word in words] == sorted(word.start for word in words)


@given(st.lists(st.from_regex(r"\A[a-z0-9_./=-]+\Z"), max_size=5))
def test_plain_words_come_back_as_they_are(words: list[str]) -> None:
    assert [word.text for word in tokenize(" ".join(words))] == words
