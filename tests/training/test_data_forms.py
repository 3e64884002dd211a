"""The forms of rows, the mapping of columns, and rows that are wrong."""

from __future__ import annotations

from typing import Any

import datasets
import numpy
import pandas
import pytest

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training import is_plain, prepare_data, train
from tests.char_tokenizer import CharTokenizer
from tests.training.support import trainable
from tests.training.test_data import tokenizer as tokenizer

USER, REPLY = {"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}
CHARACTERS = CharTokenizer()


def same(tokenizer: Any, one: Any, other: Any, **options: Any) -> bool:
    return list(prepare_data([one], tokenizer, **options)) == list(prepare_data([other], tokenizer))


def test_sharegpt_rows_are_chats(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "yes"}]
    assert same(tokenizer, {"conversations": turns}, {"messages": [USER, REPLY]})
    assert same(tokenizer, {"messages": turns}, {"messages": [USER, REPLY]})
    assert same(tokenizer, {"conversations": [USER, REPLY]}, {"messages": [USER, REPLY]})
    system = {"role": "system", "content": "be brief"}
    assert same(tokenizer, {"system": "be brief", "conversations": turns}, {"messages": [system, USER, REPLY]})


def test_alpaca_rows_are_chats_where_there_is_a_template(tokenizer: Any) -> None:
    row = {"instruction": "is it?", "input": "", "output": "yes"}
    assert same(tokenizer, row, {"messages": [USER, REPLY]})
    asked = {"role": "user", "content": "is it?\n\nthe cat"}
    assert same(tokenizer, {**row, "input": "the cat"}, {"messages": [asked, REPLY]})
    for nothing in (None, float("nan"), pandas.NA):
        assert same(tokenizer, {**row, "input": nothing}, {"messages": [USER, REPLY]})
    assert is_plain([row], tokenizer) is False


def test_alpaca_rows_have_a_text_of_their_own_where_there_is_none() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    text = CHARACTERS.decode(prepare_data([row], CHARACTERS)[0]["input_ids"])
    assert "### Instruction:" in text and "### Input:" in text and text.endswith("### Response:\n3")
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert same(CHARACTERS, {"instruction": "Add.", "output": "3"}, {"prompt": prompt, "completion": "3"})
    assert is_plain([row], CHARACTERS) is True


def test_arrays_of_messages_from_tables_are_read(tokenizer: Any) -> None:
    messages = numpy.array([USER, REPLY], dtype=object)
    assert same(tokenizer, {"messages": messages}, {"messages": [USER, REPLY]})


def test_columns_are_mapped(tokenizer: Any) -> None:
    row = {"question": "is it? ", "answer": "yes", "text": "other"}
    columns = {"prompt": "question", "completion": "answer"}
    assert same(tokenizer, row, {"prompt": "is it? ", "completion": "yes"}, columns=columns)
    assert same(tokenizer, {"body": "the cat"}, {"text": "the cat"}, columns={"text": "body"})
    chat = {"instruction": "question", "output": "answer"}
    assert same(tokenizer, {"question": "is it?", "answer": "yes"}, {"messages": [USER, REPLY]}, columns=chat)
    assert prepare_data([{"ids": [1, 2]}], columns={"input_ids": "ids"})[0]["input_ids"] == [1, 2]
    assert is_plain([row], tokenizer, columns) is True


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question", "completion": "answer"}, "columns: 'promt' is none of .*Did you mean 'prompt'"),
        ({"question": "prompt"}, "The other way round: prompt=question"),
        ({"prompt": "questoin", "completion": "answer"}, "the rows have no 'questoin', but .*Did you mean 'question'"),
        ({"prompt": "question"}, "Expected columns"),
        ("prompt=question", "columns must be a dictionary like {'prompt': 'question'}"),
    ],
)
def test_a_mapping_that_cannot_be_names_the_nearest(columns: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        prepare_data([{"question": "a", "answer": "b"}], CHARACTERS, columns=columns)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": 3}, "Row 2: 'completion' is an int (3), not text."),
        ({"prompt": 3, "completion": "b"}, "Row 2: 'prompt' is an int (3), not text."),
        ({"prompt": None, "completion": 3}, "Row 2: 'completion' is an int (3), not text."),
        ({"prompt": "a", "completion": ["b"]}, "Row 2: 'completion' is a list (['b']), not text."),
        (
            {"prompt": "a", "completon": "b"},
            "Row 2: 'completion' is missing; it has 'prompt', 'completon'. Did you mean",
        ),
        (None, "Row 2 is None, not a dictionary with prompt and completion"),
        (7, "Row 2 is an int, not a dictionary with prompt and completion"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(row: Any, message: str) -> None:
    with pytest.raises(TrainingError) as failure:
        train(trainable(), [GOOD, GOOD, row], tokenizer=CHARACTERS, max_steps=1)
    assert message in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "Row 1: 'messages' is a str ('hello'), not a list of messages."),
        (["hello"], "Row 1: message 0 of 'messages' is a str ('hello'), not a dictionary with role and content."),
        ([{"content": "a"}], "Row 1: message 0 of 'messages' has no 'role' (or 'from'); it has 'content'."),
        ([{"role": 3, "content": "a"}], "Row 1: message 0 of 'messages': 'role' is an int, not the name of a role."),
        ([USER, {"role": "assistant"}], "message 1 of 'messages' has no 'content' (or 'value'); it has 'role'."),
        ([{"role": "user", "content": None}, REPLY], "message 0 of 'messages' has no text: 'content' is None."),
        ([{"role": "user", "content": 3}, REPLY], "message 0 of 'messages' has no text: 'content' is an int"),
        (
            [{"role": "user", "content": None, "tool_calls": []}, REPLY],
            "message 0 of 'messages' has no text: 'content' is None.",
        ),
        ([{"from": "robot", "value": "a"}], "message 0 of 'messages' is from 'robot'. Did you mean 'bot'?"),
        ([USER, {"role": "gpt", "content": "a"}], "Row 1: message 1 has the role 'gpt'. Did you mean 'assistant'?"),
        (
            [USER, {"role": "zzz", "content": "a"}],
            "Row 1: message 1 has the role 'zzz'. Known: system, developer, user",
        ),
    ],
)
def test_a_bad_chat_is_named_with_what_is_wrong(tokenizer: Any, messages: Any, message: str) -> None:
    with pytest.raises(TrainingError) as failure:
        prepare_data([{"messages": [USER, REPLY]}, {"messages": messages}], tokenizer)
    assert message in str(failure.value) and "\n" not in str(failure.value)


def test_what_a_template_refuses_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{{ raise_exception('Roles must alternate') if messages|length > 2 else '<|user|>yes<|end|>' }}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(TrainingError, match=r"^Row 0: the chat template refuses it: Roles must alternate$"):
        prepare_data([{"messages": [USER, REPLY, REPLY]}], tokenizer)


def test_rows_without_anything_to_learn_are_named() -> None:
    apart = {"prompt": "a ", "completion": "b"}
    data = [apart, {"prompt": "a", "completion": " "}, apart, {"prompt": "a" * 9, "completion": "b"}]
    rows = prepare_data(data, CHARACTERS, max_length=6)
    assert len(rows) == 2
    assert rows.left_out == ((1, "the completion is empty"), (3, "nothing to learn within 6 tokens"))
    assert rows.notes.endswith(
        "2 rows left out: row 1: the completion is empty; row 3: nothing to learn within 6 tokens"
    )
    many = prepare_data([apart, *[{"prompt": "a", "completion": ""}] * 9], CHARACTERS)
    assert many.notes == "9 rows left out: rows 1, 2, 3, 4, 5 and 4 more: the completion is empty"


def test_a_model_in_the_place_of_a_tokenizer_is_what_is_blamed() -> None:
    model = trainable()
    with pytest.raises(ConfigError, match=r"^tokenizer must be a tokenizer, not a \w+, which is a model$"):
        train(model, [GOOD], tokenizer=model, max_steps=1)


@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "output")])
def test_completions_that_are_whole_numbers_are_text(names: tuple[str, str]) -> None:
    columns = dict(zip(names, ("body", "stars"), strict=True))
    note = "the numbers in 'stars' are read as text"
    rows = [{"body": "a ", "stars": number} for number in (4, 12)]
    texts = [{**row, "stars": str(row["stars"])} for row in rows]
    for data in (rows, pandas.DataFrame(rows), datasets.Dataset.from_list(rows)):
        read = prepare_data(data, CHARACTERS, columns=columns)
        assert list(read) == list(prepare_data(texts, CHARACTERS, columns=columns)) and note in read.notes
    features = datasets.Features(
        {"body": datasets.Value("string"), "stars": datasets.ClassLabel(names=["bad", "good"])}
    )
    named = datasets.Dataset.from_list([{"body": "a ", "stars": 1}], features=features)
    read = prepare_data(named, CHARACTERS, columns=columns)
    assert list(read) == list(prepare_data([{"body": "a ", "stars": "good"}], CHARACTERS, columns=columns))
    assert "the numbers in 'stars' are read as their names: 0 = bad, 1 = good" in read.notes
    unknown = datasets.Dataset.from_list([{"body": "a ", "stars": 1}, {"body": "b ", "stars": -1}], features=features)
    with pytest.raises(TrainingError, match="Row 1: 'stars' is -1, which has no name; 0 to 1 have one"):
        prepare_data(unknown, CHARACTERS, columns=columns)
    assert len(prepare_data(unknown, CHARACTERS, columns=columns, skip_bad=True)) == 1
    with pytest.raises(TrainingError, match=r"Row 0: 'stars' is a bool \(True\), not text"):
        prepare_data([{"body": "a ", "stars": True}], CHARACTERS, columns=columns)


def test_names_of_two_forms_are_told_apart() -> None:
    row = {"Nachricht": "q", "Kategorie": "a"}
    told = "instruction goes with output, and prompt with completion: columns="
    for given, right in (
        ({"instruction": "Nachricht", "completion": "Kategorie"}, {"instruction": "Nachricht", "output": "Kategorie"}),
        ({"prompt": "Nachricht", "output": "Kategorie"}, {"prompt": "Nachricht", "completion": "Kategorie"}),
    ):
        with pytest.raises(TrainingError) as failure:
            prepare_data([row], CHARACTERS, columns=given)
        assert str(failure.value) == f"columns: {told}{right}"
        assert len(prepare_data([row], CHARACTERS, columns=right)) == 1


def test_a_suggested_mapping_applies_the_chat_template_where_there_is_one() -> None:
    row = {"Nachricht": "q", "Kategorie": "a"}
    for reader, names in ((CHARACTERS, "'prompt', 'completion'"), (CharTokenizer("yes"), "'instruction', 'output'")):
        first, second = names.split(", ")
        with pytest.raises(TrainingError) as failure:
            prepare_data([row], reader)
        assert f"columns={{{first}: 'Nachricht', {second}: 'Kategorie'}}" in str(failure.value)
        with pytest.raises(TrainingError) as failure:
            train(trainable(), [row], tokenizer=reader, max_steps=1)
        assert f"columns={{{first}: 'Nachricht', {second}: 'Kategorie'}}" in str(failure.value)
