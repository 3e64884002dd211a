"""One rule for rows that cannot be read, whatever they come in: counted by reason, and left out on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from torch.utils.data import IterableDataset

from nbpeft.errors import TrainingError
from nbpeft.training import prepare_data, train
from nbpeft.training.data import summarize
from nbpeft.training.loop.packing import longest_sequence
from nbpeft.training.loop.rows import first_rows
from tests.char_tokenizer import CharTokenizer
from tests.training.support import trainable
from tests.training.test_data import tokenizer as tokenizer

CHARACTERS = CharTokenizer()
GOOD = {"prompt": "a", "completion": "b"}
BAD = {"prompt": "a", "completion": 3}
ROWS: list[Any] = [GOOD, BAD, GOOD, {"prompt": "a", "completion": 4}, None, {"prompt": 5, "completion": "b"}]
FOUND = (
    "4 of 6 rows cannot be read: rows 1, 3: 'completion' is an int (3), not text; row 4: is None, not a dictionary "
    "with prompt and completion"
)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


def in_a_file(folder: Path) -> str:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(folder / "rows.jsonl")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda folder: ROWS,
    "tuple": lambda folder: tuple(ROWS),
    "file": in_a_file,
}


@pytest.mark.parametrize("source", list(SOURCES))
def test_they_are_counted_by_reason_and_left_out_on_request(source: str, tmp_path: Path) -> None:
    data = SOURCES[source](tmp_path)
    for read in (prepare_data, summarize):
        with pytest.raises(TrainingError) as refused:
            read(data, CHARACTERS)
        assert str(refused.value).startswith(FOUND)
        assert str(refused.value).endswith("Such rows are left out on request (skip_bad=…).")
    rows = prepare_data(data, CHARACTERS, skip_bad=True)
    assert len(rows) == 2 and "4 rows left out: row 1: 'completion' is an int (3), not text; " in rows.notes
    assert summarize(data, CHARACTERS, skip_bad=True).left_out_count == 4
    result = train(trainable(), data, tokenizer=CHARACTERS, max_steps=1, skip_bad=True)
    assert result.steps == 1 and "4 rows left out" in result.message


@pytest.mark.parametrize("empty", [float("nan"), None, "", " "])
def test_an_empty_cell_is_left_out_in_a_list_and_in_a_table(empty: Any) -> None:
    rows = [GOOD, {**GOOD, "completion": empty}]
    for data in (rows, pandas.DataFrame(rows)):
        assert prepare_data(data, CHARACTERS).left_out == ((1, "the completion is empty"),)


def test_chats_keep_the_same_rule(tokenizer: Any) -> None:
    user, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    chats = [[user, reply], [user], [user, {**reply, "content": ""}], [{**user, "role": "usr"}, reply], "text"]
    data = [{"messages": messages} for messages in chats]
    with pytest.raises(
        TrainingError, match=r"^2 of 5 rows cannot be read: row 3: message 0 has the role 'usr'\..*row 4"
    ):
        prepare_data(data, tokenizer)
    rows = prepare_data(data, tokenizer, skip_bad=True)
    assert [number for number, _ in rows.left_out] == [1, 2, 3, 4]
    assert rows.left_out[0][1].startswith("no turn of the assistant") and "is empty" in rows.left_out[1][1]


def test_lines_that_cannot_be_parsed_are_bad_rows(tmp_path: Path) -> None:
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text("prompt,completion\na,b\nc,d,e\nf,g\nh,i,j\n")
    lines.write_text(f"{json.dumps(GOOD)}\n{{\n{json.dumps(GOOD)}\n")
    with pytest.raises(
        TrainingError, match=r"^2 of 4 rows cannot be read: a.csv, line 3 .*; a.csv, line 5 .*\(skip_bad=…\)"
    ):
        prepare_data(table, CHARACTERS)
    with pytest.raises(TrainingError, match=r"^a.jsonl, line 2 is not JSON: .*\(skip_bad=…\)"):
        prepare_data(lines, CHARACTERS)
    assert len(prepare_data(table, CHARACTERS, skip_bad=True)) == 2
    assert prepare_data(lines, CHARACTERS, skip_bad=True).left_out[0][1].startswith("a.jsonl, line 2 is not JSON")
    lines.write_text(f"{{\n{json.dumps(GOOD)}\n")
    assert len(prepare_data(lines, CHARACTERS, skip_bad=True)) == 1
    lines.write_text("{\n{\n")
    with pytest.raises(TrainingError, match=r"^2 of 2 rows cannot be read"):
        prepare_data(lines, CHARACTERS, skip_bad=True)


def test_a_stream_ends_at_the_first_or_goes_on_on_request() -> None:
    with pytest.raises(TrainingError, match=r"^Row 1: 'completion' is an int \(3\), not text\. Such rows"):
        list(prepare_data(Stream(), CHARACTERS))
    assert len(list(prepare_data(Stream(), CHARACTERS, skip_bad=True))) == 2


def test_rows_left_out_of_a_stream_are_named_once_for_each_reason() -> None:
    result = train(trainable(), Stream(), tokenizer=CHARACTERS, max_steps=3, skip_bad=True)
    assert result.message.count("rows left out, first row 1: 'completion' is an int (3), not text") == 1
    assert "rows left out, first row 4: " in result.message and "row 3" not in result.message

    class Longer(Stream):
        def __iter__(self) -> Iterator[Any]:
            return iter(ROWS * 3)

    held_out = train(trainable(), Longer(), 2, tokenizer=CHARACTERS, max_steps=1, skip_bad=True)
    assert held_out.message.count("rows left out, first row 1: ") == 1


def test_when_all_rows_are_bad_nothing_offers_to_leave_them_out() -> None:
    for count, beginning in ((3, "None of the 3 rows can be read: rows 0, 1, 2: "), (5000, "None of the 100 rows can")):
        with pytest.raises(TrainingError) as refused:
            prepare_data([{**BAD, "completion": 0.5}] * count, CHARACTERS)
        assert str(refused.value).startswith(beginning) and "skip_bad" not in str(refused.value)
    with pytest.raises(TrainingError, match="None of the 2 rows has anything to learn"):
        prepare_data([{**BAD, "completion": 0.5}] * 2, CHARACTERS, skip_bad=True)


def test_commands_that_cannot_leave_rows_out_do_not_offer_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^Row 1: 'completion' is an int \(3\), not text\.$"):
        first_rows(trainable(), [GOOD, BAD], rows=2, tokenizer=CHARACTERS)
    (tmp_path / "bad.jsonl").write_text(f"no JSON\n{json.dumps(GOOD)}\n")
    with pytest.raises(TrainingError, match=r"^bad\.jsonl, line 1 is not JSON: [^.]*\.$"):
        first_rows(trainable(), str(tmp_path / "bad.jsonl"), rows=2, tokenizer=CHARACTERS)
    for data in ([GOOD, BAD], str(tmp_path / "bad.jsonl")):
        with pytest.raises(TrainingError) as refused:
            longest_sequence(trainable(), data, tokenizer=CHARACTERS)
        assert "left out" not in str(refused.value)
