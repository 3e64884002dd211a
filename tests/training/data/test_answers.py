"""Distinct answers are listed where they are few, with those that look like mistakes."""

from __future__ import annotations

from typing import Any

from nbpeft import score
from nbpeft.display.html import to_html
from nbpeft.session import Session
from nbpeft.training.data import summarize
from nbpeft.training.data.answers import few_answers, odd_answers
from tests.char_tokenizer import CharTokenizer
from tests.scoring.support import adapted

TEAMS = ["heating"] * 30 + ["plumbing"] * 25 + ["Heating ", "PLUMBING", "n/a", "?"]


def test_few_answers_are_listed_and_odd_ones_pointed_out() -> None:
    rows = [{"prompt": f"ticket {number}: ", "completion": team} for number, team in enumerate(TEAMS)]
    shown = Session().data(rows, CharTokenizer())
    assert shown.summary.answers[:2] == (("heating", 30), ("plumbing", 25)) and len(shown.summary.answers) == 6
    for text in (str(shown), to_html(shown.view())):
        assert "6 different answers" in text and "Heating " in text
    alike, gaps = (note for note in shown.notes if note.startswith("answers"))
    assert alike.endswith("alone: 'heating' 30, 'Heating ' 1; 'plumbing' 25, 'PLUMBING' 1")
    assert gaps.endswith("empty cells: 'n/a' 1, '?' 1")
    found = score(
        adapted(), rows, tokenizer=CharTokenizer(), adapters="sql", include_base=False, max_new_tokens=1, progress=False
    )
    assert {alike, gaps} <= {*found.notes}


def test_texts_long_answers_and_answers_of_one_row_each_are_not_listed() -> None:
    tokenizer: Any = CharTokenizer()
    for rows in (
        [{"text": "ab"}] * 30,
        [{"prompt": "a", "completion": "b" * 40}] * 30,
        [{"prompt": "a", "completion": f"{number}"} for number in range(30)],
    ):
        assert summarize(rows, tokenizer).answers == ()


def test_what_means_something_is_not_odd() -> None:
    fine = ["1"] * 9 + ["-1"] * 9 + ["+"] * 9 + ["-"] * 9 + ["none"] * 9 + ["unknown"] * 9
    assert odd_answers(few_answers(fine)) == ()
    assert odd_answers(few_answers(["n/a"] * 10 + ["yes"] * 20)) == ()  # a label of its own, as often as it is there
