from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nbpeft.errors import TrainingError
from nbpeft.training import Collator, is_plain, prepare_data, train
from nbpeft.training.data import ModelInputs, columns_of, open_data
from nbpeft.training.data.forms import checked_columns
from tests.tiny_models import llama
from tests.training.support import trainable

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["the cat sat on the mat", "yes and no"] * 20,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>", chat_template=CHATML, model_max_length=64
    )


class Slow:
    """A tokenizer without offsets."""

    is_fast = False
    chat_template: str | None = CHATML

    def __init__(self, inner):
        self._inner = inner

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self._inner(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def __getattr__(self, name):
        return getattr(self._inner, name)


def learned(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.fixture(params=["fast", "slow"])
def either(request, tokenizer):
    return tokenizer if request.param == "fast" else Slow(tokenizer)


def test_text_is_learned_whole_with_an_end(either):
    rows = prepare_data([{"text": "the cat sat"}, {"text": "on the mat"}], either)
    assert [learned(either, row) for row in rows] == ["the cat sat<|end|>", "on the mat<|end|>"]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    strings = prepare_data(["the cat sat", "on the mat"], either)
    assert list(strings) == list(rows)


def test_only_the_completion_is_learned(either):
    rows = prepare_data([{"prompt": "is it? ", "completion": "yes and no"}], either)
    assert learned(either, rows[0]) == "yes and no<|end|>"
    assert either.decode(rows[0]["input_ids"]) == "is it? yes and no<|end|>"


def test_a_token_over_the_border_belongs_to_the_completion(either):
    rows = prepare_data([{"prompt": "the c", "completion": "at"}], either)
    assert learned(either, rows[0]).endswith("at<|end|>")
    assert not learned(either, rows[0]).startswith("the")


def test_the_assistants_turns_are_learned(either):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "no"},
    ]
    rows = prepare_data([{"messages": messages}], either)
    assert learned(either, rows[0]) == "yes<|end|>\nno<|end|>\n"
    text = either.decode(rows[0]["input_ids"])
    assert text.startswith("<|system|>be brief<|end|>\n<|user|>is it?")
    pair = prepare_data([{"prompt": messages[:4], "completion": messages[4:]}], either)
    assert learned(either, pair[0]) == "no<|end|>\n"
    assert pair[0]["input_ids"] == rows[0]["input_ids"]


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    messages = [
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "yes yes"},
        {"role": "assistant", "content": "no"},
    ]
    tokenizer = Slow(tokenizer)
    tokenizer.apply_chat_template = lambda *args, **kwargs: tokenizer._inner.apply_chat_template(
        *args, chat_template=FORGETFUL, **kwargs
    )
    rows = prepare_data([{"messages": messages}], tokenizer)
    assert learned(tokenizer, rows[0]) == "yes<|end|><think></think>no<|end|>\n"


def test_chat_errors(tokenizer):
    with pytest.raises(TrainingError, match=r"None of the 1 rows .* no turn of the assistant \(roles: user\)"):
        prepare_data([{"messages": [{"role": "user", "content": "hi"}]}], tokenizer)
    bare = Slow(tokenizer)
    bare.chat_template = None
    with pytest.raises(TrainingError, match=r"^The tokenizer has no chat template"):
        prepare_data([{"messages": [{"role": "user", "content": "hi"}]}], bare)


def test_long_rows_are_cut_and_rows_without_anything_left_are_dropped(tokenizer):
    given = [
        {"prompt": "the cat sat on the mat " * 3, "completion": "yes"},
        {"prompt": "is it? ", "completion": "yes " * 40},
    ]
    rows = prepare_data(given, tokenizer, max_length=12)
    assert len(rows) == 1 and rows.dropped == 1 and rows.truncated == 2
    assert len(rows[0]["input_ids"]) == len(rows[0]["labels"]) == 12
    assert rows.notes == (
        "2 of 2 rows were truncated to the maximum length; 1 row left out: row 0: nothing to learn within 12 tokens"
    )
    with pytest.raises(TrainingError, match="None of the 1 rows has anything to learn within 4 tokens"):
        prepare_data([{"prompt": "the cat sat on the mat", "completion": "yes"}], tokenizer, max_length=4)


def test_the_tokenizers_own_limit_holds(tokenizer):
    rows = prepare_data([{"text": "a b c d e f g h " * 50}], tokenizer)
    assert len(rows[0]["input_ids"]) == 64 and rows.truncated == 1 and rows.token_count == 64


def test_datasets_and_tokenised_rows(tokenizer):
    data = datasets.Dataset.from_list([{"prompt": "is it? ", "completion": "yes", "id": 1}])
    assert learned(tokenizer, prepare_data(data, tokenizer)[0]) == "yes<|end|>"
    tokenised = datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}])
    assert prepare_data(tokenised) is tokenised
    listed = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    assert list(prepare_data(listed)) == listed
    typed = {"input_ids": [1, 2], "token_type_ids": [0, 0]}
    with pytest.raises(TrainingError, match="Row 1 has no 'token_type_ids', which other rows have"):
        prepare_data([typed, listed[1]])
    assert list(prepare_data([{**listed[0], "id": 1}, listed[1]])) == listed


class NoRows:
    def __iter__(self):
        return iter([])


def test_white_space_around_the_name_of_a_column_need_not_be_given() -> None:
    columns = ["Text\u00a0", " Team ", "both", "both "]
    assert checked_columns({"prompt": "Text", "completion": "Team"}, columns) == {
        "prompt": "Text\u00a0",
        "completion": " Team ",
    }
    assert checked_columns({"prompt": "both "}, columns) == {"prompt": "both "}
    with pytest.raises(TrainingError, match="the rows have no 'other'"):
        checked_columns({"prompt": "other"}, columns)


def test_an_export_of_chatgpt_is_not_taken_for_prompts(tokenizer) -> None:
    export = {"title": "Trip", "mapping": {"a": {"message": {"author": {"role": "user"}}, "children": []}}}
    with pytest.raises(TrainingError, match=r"'mapping' has each conversation as a tree.*make lists of messages first"):
        prepare_data([export], tokenizer)
    with pytest.raises(TrainingError, match=r"what they are called: columns=.*'title', '[a-z]+': 'COLUMN'"):
        prepare_data([{"title": "Trip", "tags": {"a": 1}}], tokenizer)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"prompts": "a", "completion": "b"}], r"found 'prompts', 'completion'. Did you mean 'prompt'"),
        (
            [{"question": "a", "answer": "b"}],
            r"Expected columns .*found 'question', 'answer'. Say which is which",
        ),
        (
            [{"ID": "a", "Ticket Text ": "b"}],
            r"'. Say what they are called: columns=\{'instruction': 'Ticket Text ', 'output': 'COLUMN'\}",
        ),
        (
            [{"Nr": 1, "Course": "a", "Room": "b"}],
            r"'Room'. Say what they are called, e\.g\. columns=\{'instruction': 'Course', 'output': 'Room'\}\.$",
        ),
        (
            [{"Room": "b", "Promt": "a"}],
            r"Did you mean 'prompt'\? Or say what they are called, e\.g\. columns=\{'instruction': 'Promt', 'output'",
        ),
        (
            [{"Name": "a", "Inhalt": "a long text", "Ziel": "b"}],
            r"e\.g\. columns=\{'instruction': 'Inhalt', 'output': 'Ziel'\}\.$",
        ),
        ([{"dialog": [{"role": "user"}]}], r"Say where the conversations are: columns=\{'messages': 'dialog'\}\."),
        ([{"talk": [{"from": "human"}]}], r"columns=\{'conversations': 'talk'\}\."),
        ([{"messages": [{"speaker": "a", "text": "b"}]}], r"'text'. Rename them to role and content"),
        (
            [{"prompt": "a", "code": "b"}],
            r"'output': 'code'\}. Prompts alone are for rewards \(objective='grpo'\)\.$",
        ),
        ([{"Course": "a"}], r"'Course'. Say what they are called, e\.g\. columns=\{'text': 'Course'\}\.$"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            r"\(objective='dpo'\).*: columns=\{'completion': 'chosen'\} takes",
        ),
        (
            [{"question": "a", "chosen": "b", "rejected": "c"}],
            r"columns=\{'completion': 'chosen', 'prompt': 'question'",
        ),
        ([{"chosen": [], "rejected": []}], r"columns=\{'messages': 'chosen'\} takes the chosen ones"),
        ([], "no rows"),
        (datasets.Dataset.from_dict({"text": []}), "no rows"),
        ([[1, 2]], "Row 0 is a list, not a dictionary with prompt and completion"),
        ("text", "'text' does not name data; expected a file"),
        (NoRows(), "found a NoRows"),
        (b"text", "found a bytes"),
        (None, "found None"),
        ({"text": ["a"]}, "found a dictionary with 'text'"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), "pass one of them: train"),
        ([{"text": "a"}, {"other": "b"}], "Row 1: 'text' is missing; it has 'other'"),
        ([{"text": "a"}, {"text": 3}], r"Row 1: 'text' is an int \(3\), not text"),
    ],
)
def test_other_data_is_refused_with_what_was_found(tokenizer, data, message):
    with pytest.raises(TrainingError, match=message) as caught:
        prepare_data(data, tokenizer)
    assert "\n" not in str(caught.value)


def test_tables_and_missing_tokenizers():
    class Table:
        columns = ("text",)

        def to_dict(self, kind):
            return [{"text": "a"}] if kind == "records" else None

    assert columns_of(open_data(Table())) == ("text",)
    with pytest.raises(TrainingError, match="Rows with text need a tokenizer"):
        prepare_data([{"text": "a"}])


def test_encoder_decoder_rows(tokenizer):
    apart = ModelInputs(encoder_decoder=True)
    rows = prepare_data([{"prompt": "the cat", "completion": "yes"}], tokenizer, inputs=apart)
    assert tokenizer.decode(rows[0]["input_ids"]) == "the cat" and tokenizer.decode(rows[0]["labels"]) == "yes"
    for row, found in (({"text": "a"}, "text"), ({"messages": [{"role": "assistant", "content": "a"}]}, "messages")):
        with pytest.raises(TrainingError, match=f"needs rows with prompt and completion, found {found}"):
            prepare_data([row], tokenizer, inputs=apart)


def test_the_collator_pads_on_the_right():
    batch = Collator(pad_token_id=9, copy_labels=True)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_the_collator_with_labels_masks_and_numbers():
    rows = [
        {"input_ids": [1, 2], "attention_mask": [0, 1], "label": 1, "score": 0.5},
        {"input_ids": torch.tensor([3]), "attention_mask": [1], "label": 0, "score": 1.5},
    ]
    batch = Collator()(rows)
    assert batch["labels"].tolist() == [1, 0] and batch["score"].tolist() == [0.5, 1.5]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 0]] and batch["input_ids"].tolist() == [[1, 2], [3, 0]]
    masked = Collator(copy_labels=True)([{"input_ids": [1, 2], "attention_mask": [0, 1]}])
    assert masked["labels"].tolist() == [[-100, 2]]
    wide = Collator(pad_to_multiple_of=8)([{"input_ids": [1, 2], "labels": [1, 2]}])
    assert wide["input_ids"].shape == wide["labels"].shape == (1, 8)
    assert rows[0].keys() == {"input_ids", "attention_mask", "label", "score"}


def test_a_chat_trains(tokenizer):
    model = trainable(llama(vocab_size=len(tokenizer)))
    chat = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes and no"}]
    result = train(model, [{"messages": chat}] * 8, tokenizer=tokenizer, max_steps=20, learning_rate=3e-2)
    assert result.state.history[-1][1] < result.state.history[0][1] - 0.2
    cut = train(model, [{"messages": chat}] * 8, tokenizer=tokenizer, max_steps=2, max_length=12, learning_rate=1e-3)
    assert cut.message == "8 of 8 rows were truncated to the maximum length"


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        ("the cat", True),
        ({"text": "the cat"}, True),
        ({"prompt": "the", "completion": " cat"}, True),
        ({"prompt": [], "completion": [{"role": "assistant", "content": "the"}]}, False),
        ({"messages": [{"role": "assistant", "content": "the"}]}, False),
        ({"input_ids": [1]}, None),
    ],
)
def test_text_outside_a_chat_template_is_known(row: Any, plain: bool | None) -> None:
    assert is_plain([row]) is plain
    with pytest.raises(TrainingError, match="Expected columns"):
        is_plain([{"question": "the"}])
