"""Rows with a chosen and a rejected completion."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import TrainingError
from nbpeft.names import PAIRS
from nbpeft.training import is_plain, prepare_data, summarize
from nbpeft.training.data import ModelInputs
from tests.training.test_data import tokenizer as tokenizer

INPUTS = ModelInputs(kind=PAIRS)
USER, YES, NO = (
    {"role": "user", "content": "is it?"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
SYSTEM = {"role": "system", "content": "be brief"}


def pairs(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> Any:
    return prepare_data([*rows], tokenizer, inputs=INPUTS, **options)


def coded(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    """A row with one completion, as training reads it."""
    return dict(prepare_data([row], tokenizer)[0])


def as_two(tokenizer: Any, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    other = {f"rejected_{name}": value for name, value in coded(tokenizer, rejected).items()}
    return {**coded(tokenizer, chosen), **other}


def test_each_completion_is_coded_like_that_of_a_row_with_one(tokenizer: Any) -> None:
    [row] = pairs(tokenizer, {"prompt": "is it? ", "chosen": "yes", "rejected": "no and no"})
    one, other = ({"prompt": "is it? ", "completion": text} for text in ("yes", "no and no"))
    assert row == as_two(tokenizer, one, other)


CHATS: dict[str, dict[str, Any]] = {
    "prompt of messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "prompt of text": {"prompt": "is it?", "chosen": [YES], "rejected": [NO]},
    "no prompt": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "the prompt twice": {"prompt": "is it?", "chosen": [USER, YES], "rejected": [USER, NO]},
}


@pytest.mark.parametrize("case", CHATS)
def test_messages_have_the_chat_template_and_the_prompt_that_they_share(case: str, tokenizer: Any) -> None:
    one, other = ({"messages": [USER, reply]} for reply in (YES, NO))
    assert list(pairs(tokenizer, CHATS[case])) == [as_two(tokenizer, one, other)]
    one, other = ({"messages": [SYSTEM, USER, reply]} for reply in (YES, NO))
    assert list(pairs(tokenizer, {**CHATS[case], "system": "be brief"})) == [as_two(tokenizer, one, other)]
    assert is_plain([CHATS[case]], tokenizer) is False


def test_turns_that_both_conversations_have_are_not_trained_on(tokenizer: Any) -> None:
    before = [USER, NO, USER]
    [row] = pairs(tokenizer, {"chosen": [*before, YES], "rejected": [*before, NO]})
    one, other = ({"prompt": before, "completion": [reply]} for reply in (YES, NO))
    assert row == as_two(tokenizer, one, other)
    chats = [[reply, USER, NO] for reply in (YES, NO)]
    [row] = pairs(tokenizer, {"chosen": [USER, *chats[0]], "rejected": [USER, *chats[1]]})
    one, other = ({"prompt": [USER], "completion": chat} for chat in chats)
    assert row == as_two(tokenizer, one, other)


def test_texts_without_a_prompt_differ_from_the_word_on_in_which_they_differ(tokenizer: Any) -> None:
    [row] = pairs(tokenizer, {"chosen": "is it? yes and no", "rejected": "is it? yesterday"})
    one, other = ({"prompt": "is it? ", "completion": text} for text in ("yes and no", "yesterday"))
    assert row == as_two(tokenizer, one, other)


def test_a_row_with_an_empty_completion_is_left_out_and_named(tokenizer: Any) -> None:
    good = {"prompt": "is it? ", "chosen": "yes", "rejected": "no"}
    long = {"prompt": "is it? " * 30, "chosen": "yes", "rejected": "no"}
    rows = pairs(tokenizer, good, {**good, "rejected": ""}, {**good, "weight": 0}, long, max_length=20)
    assert len(rows) == 1
    for told in ("1: rejected: the completion is empty", "2: its weight is 0", "3: nothing to learn within"):
        assert f"row {told}" in rows.notes


def test_both_completions_are_shown_as_they_are_read(tokenizer: Any) -> None:
    data = [{"prompt": "is it? ", "chosen": "yes and no", "rejected": "no"}]
    found = summarize(data, tokenizer, inputs=ModelInputs(kind=None))
    [shown] = found.rows
    texts = [
        "".join(span.text for span in shown.spans if span.learned),
        "".join(span.text for span in shown.target if span.compared),
    ]
    assert [text.replace("<|end|>", "").strip() for text in texts] == ["yes and no", "no"]
    assert (found.form, shown.target_title) == ("chosen and rejected", "rejected")
    assert found.token_count == pairs(tokenizer, *data).token_count


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"chosen": "yes"}, r"Expected columns chosen and rejected \(and prompt\); found 'chosen'"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "Row 0: 'chosen' is an int"),
        ({"prompt": [USER], "chosen": "yes", "rejected": [NO]}, "Row 0: 'rejected' is a list"),
        ({"prompt": 3, "chosen": [YES], "rejected": [NO]}, "Row 0: 'prompt' is an int"),
        ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, "Row 0: 'prompt' is a list"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "image": "x"}, "'image' cannot be trained on"),
    ],
)
def test_a_wrong_row_is_one_line(row: dict[str, Any], told: str, tokenizer: Any) -> None:
    with pytest.raises(TrainingError, match=told) as caught:
        pairs(tokenizer, row)
    assert "\n" not in str(caught.value)


def test_columns_have_other_names(tokenizer: Any) -> None:
    row, names = {"q": "is it? ", "good": "yes", "bad": "no"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}
    plain = {"prompt": "is it? ", "chosen": "yes", "rejected": "no"}
    assert list(pairs(tokenizer, row, columns=names)) == list(pairs(tokenizer, plain))


def test_rows_that_have_another_form_too_are_read_in_that(tokenizer: Any) -> None:
    row = {"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]}
    found = prepare_data([row], tokenizer, inputs=ModelInputs(kind=None))
    assert list(found) == [coded(tokenizer, {"messages": [USER, YES]})]
    assert found.notes == "columns not used: 'chosen', 'rejected'"
