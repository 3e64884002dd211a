"""Whatever a row holds is trained on, refused by name, or named in the notes and in the preview: there is no fourth."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from torch.utils.data import IterableDataset

import nbpeft
from nbpeft.errors import TrainingError
from nbpeft.training import summarize, train
from nbpeft.training.loop.rows import model_inputs, training_rows
from nbpeft.training.request import TrainRequest
from tests.tiny_models import classifier, llama
from tests.training.support import trainable
from tests.training.test_data import tokenizer as tokenizer

PRINTING = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that prints what the tokenizer's own leaves out."""
USER, REPLY = {"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, REPLY]},
    "prompt and completion": {"prompt": "is it? ", "completion": "yes"},
    "of messages": {"prompt": [USER], "completion": [REPLY]},
    "conversations": {"conversations": [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "yes"}]},
    "instruction": {"instruction": "is it?", "output": "yes"},
    "text": {"text": "the cat sat"},
    "tokenized": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "labelled": {"text": "the cat sat", "label": 1},
    "tokenized and labelled": {"input_ids": [5, 6, 7], "labels": 1},
}
CHATS = ("messages", "of messages", "conversations")
COLUMNS: dict[str, Any] = {
    **{row: value for form in ROWS.values() for row, value in form.items() if row not in ("input_ids", "label")},
    "tools": [{"type": "function", "function": {"name": "look", "description": "looks"}}],
    **{"system": "be brief", "input": "the cat", "text_pair": "the mat", "label": False, "weight": 0.5},
    **{name: ["a.png"] for name in ("image", "images", "video", "videos", "audio", "audios", "pixel_values")},
    **{"chosen": "a", "rejected": "b", "completion_mask": [0, 0, 1], "assistant_masks": [0, 1, 0]},
    **{"loss_weights": [0.5, 1.0, 2.0], "attention_mask": [1, 1, 0], "position_ids": [0, 1, 1]},
    **{"token_type_ids": [0, 1, 1], "task_ids": 1, "label_ids": 2, "chat_template_kwargs": {"enable_thinking": True}},
    **{"id": 7, "source": "web", "score": 0.5, "history": [["a", "b"]], "reasoning": "because", "weights": [1, 0]},
}
KEYS: dict[str, Any] = {
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "the mat"}}}],
    **{"weight": 0.5, "images": ["a.png"], "audio": "a.wav", "reasoning_content": "because", "thinking": "because"},
    **{"name": "Ann", "tool_call_id": "1", "id": 3, "train": False, "prefix": True, "refusal": "never", "value": "no"},
    **{"from": "human", "function_call": {"name": "look"}, "annotations": [{"a": 1}], "loss": 0, "unheard": "of"},
}
PARTS: dict[str, dict[str, Any]] = {
    **{kind: {"type": kind, kind: "a.png"} for kind in ("image", "image_url", "video", "audio", "input_audio", "file")},
    **{kind: {"type": kind, kind: "because"} for kind in ("thinking", "reasoning", "tool_use", "tool_result", "odd")},
    "cache_control": {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}},
    "citations": {"type": "text", "text": "", "citations": ["a"]},
    "text": {"type": "text", "text": "and no"},
}


@functools.cache
def model(labelled: bool) -> Any:
    return trainable(classifier(vocab_size=300), task_type="SEQ_CLS") if labelled else trainable(llama(vocab_size=300))


def outcome(tokenizer: Any, form: str, key: str, changed: Callable[[dict[str, Any]], None]) -> str:
    """What becomes of a key that the last of some rows has; of rows that are tokens, all."""
    labelled = "labelled" in form
    plain = [copy.deepcopy(ROWS[form]) for _ in range(3)]
    given = copy.deepcopy(plain)
    for row in given if "tokenized" in form else given[-1:]:
        changed(row)
    before = training_rows(TrainRequest(model(labelled), plain, tokenizer=tokenizer))
    try:
        after = training_rows(TrainRequest(model(labelled), given, tokenizer=tokenizer))
    except TrainingError as error:
        with pytest.raises(TrainingError):
            summarize(given, tokenizer, inputs=model_inputs(model(labelled)))
        return "refused" if key in str(error) and "\n" not in str(error) else f"refused without its name: {error}"
    found = []
    if list(before.train) != list(after.train):
        found.append("trained on")
    shown = "; ".join(summarize(given, tokenizer, inputs=model_inputs(model(labelled))).unused)
    if repr(key) in "".join(after.notes) and repr(key) in shown:
        found.append("named")
    return " and ".join(found) or f"passed over; notes: {after.notes}, preview: {shown!r}"


@pytest.fixture(params=["leaves out", "prints"])
def template(request: pytest.FixtureRequest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "prints":
        monkeypatch.setattr(tokenizer, "chat_template", PRINTING)
    return str(request.param)


def check(found: dict[Any, str]) -> None:
    assert found and not {
        place: what for place, what in found.items() if what not in ("trained on", "refused", "named")
    }


@pytest.mark.drawn(6)
@pytest.mark.parametrize("form", ROWS)
def test_columns_are_conserved(tokenizer: Any, template: str, form: str) -> None:
    columns = {name: value for name, value in COLUMNS.items() if name not in ROWS[form]}
    found = {name: outcome(tokenizer, form, name, with_column(name, value)) for name, value in columns.items()}
    check(found)
    assert found["id"] == found["source"] == "named" and found["weight"] == "trained on"


def with_column(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({name: value})


def with_key(form: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def changed(row: dict[str, Any]) -> None:
        column = "completion" if form == "of messages" else form
        row[column][-1] = {**row[column][-1], key: value}

    return changed


@pytest.mark.parametrize("form", CHATS)
def test_keys_of_messages_are_conserved(tokenizer: Any, template: str, form: str) -> None:
    keys = {key: value for key, value in KEYS.items() if form != "conversations" or key not in ("from", "value")}
    found = {key: outcome(tokenizer, form, key, with_key(form, key, value)) for key, value in keys.items()}
    check(found)
    assert found["weight"] == "trained on" and found["images"] == "refused" and found["unheard"] == "named"
    printed = "trained on" if template == "prints" else "named"
    assert found["reasoning_content"] == found["tool_calls"] == printed


@pytest.mark.parametrize("form", CHATS)
def test_parts_of_content_are_conserved(tokenizer: Any, form: str) -> None:
    name = "value" if form == "conversations" else "content"
    found = {
        key: outcome(tokenizer, form, key, with_key(form, name, [{"type": "text", "text": "yes"}, part]))
        for key, part in PARTS.items()
        if part.get("text") != ""
    }
    found |= {
        key: outcome(tokenizer, form, key, with_key(form, name, [{**part, "text": "yes"}]))
        for key, part in PARTS.items()
        if part.get("text") == ""
    }
    check(found)
    assert found["image"] == "refused" and found["text"] == "trained on" and found["cache_control"] == "named"


class Rows(IterableDataset[Any]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def written(rows: list[Any], folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


CONTAINERS: dict[str, Callable[[list[Any], Path], Any]] = {
    "a list": lambda rows, folder: rows,
    "a dataset": lambda rows, folder: datasets.Dataset.from_list(rows),
    "a table": lambda rows, folder: pandas.DataFrame(rows),
    "a file": written,
    "a stream": lambda rows, folder: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "a torch stream": lambda rows, folder: Rows(rows),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_notes_are_the_same_whatever_rows_come_in(tokenizer: Any, container: str, tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**REPLY, "name": "Ann"}], "id": number, "odd": None} for number in range(4)]
    given = CONTAINERS[container](rows, tmp_path)
    notes = "columns not used: 'id'; not printed by the chat template, so not trained on: 'name'"
    result = train(model(False), given, tokenizer=tokenizer, max_steps=1, learning_rate=1e-3)
    assert result.message == result.state.message == notes
    shown = nbpeft.get_session().data(CONTAINERS[container](rows, tmp_path), tokenizer)
    assert "3 of 4 rows are equal to earlier ones" in shown.notes[-1]
    assert list(shown.notes[:-1]) == notes.split("; ") and "note: columns not used: 'id'" in str(shown)


EMPTY: dict[str, list[Any]] = {
    "prompt and completion": [{"prompt": "is it? ", "completion": text} for text in ("yes", None, "", " ")],
    "text": [{"text": text} for text in ("the cat", None, "", " ")],
    "instruction": [{"instruction": "is it?", "output": text} for text in ("yes", None, "", " ")],
    "messages": [{"messages": [USER, {**REPLY, "content": text}]} for text in ("yes", None, "", " ")],
    "parts": [
        {
            "messages": [
                {**turn, "content": [{"type": "text", "text": part}]} for turn, part in ((USER, "a"), (REPLY, text))
            ]
        }
        for text in ("yes", "", " ", "\n")
    ],
    "no turns": [{"messages": messages} for messages in ([USER, REPLY], [], None, [])],
    "no turn of the assistant": [{"messages": [USER, *more]} for more in ([REPLY], [], [USER], [])],
}


@pytest.mark.parametrize(("form", "container"), list(itertools.product(EMPTY, CONTAINERS)))
def test_what_is_empty_is_left_out_whatever_it_comes_in(
    tokenizer: Any, form: str, container: str, tmp_path: Path
) -> None:
    given = training_rows(TrainRequest(model(False), CONTAINERS[container](EMPTY[form], tmp_path), tokenizer=tokenizer))
    assert len(list(given.train)) == 1
    if "stream" not in container:
        assert "3 rows left out: row" in given.notes[0]
    shown = summarize(CONTAINERS[container](EMPTY[form], tmp_path), tokenizer)
    assert (shown.row_count, shown.left_out_count) == (1, 3)


def test_what_is_read_and_empty_is_named(tokenizer: Any) -> None:
    for form, column in (("prompt and completion", "prompt"), ("instruction", "instruction")):
        for nothing in (None, "", float("nan")):
            rows = [ROWS[form], {**ROWS[form], column: nothing}]
            found = training_rows(TrainRequest(model(False), rows, tokenizer=tokenizer))
            assert found.notes == (f"learned although empty: '{column}' (1 of 2 rows)",)


def test_a_stream_names_what_comes_later_when_it_comes(tokenizer: Any) -> None:
    rows = Rows([{"text": "the cat"}] * 8 + [{"text": "the cat", "late": 1}] * 8)
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    assert "not used" not in train(model(False), rows, max_steps=1, **arguments).message
    assert train(model(False), rows, max_steps=8, **arguments).message == "columns not used: 'late'"
    rows = Rows(
        [{"text": "the cat", "id": 1}, {"text": "the cat", "early": 1}, {"text": "a"}, {"text": "a", "late": 1}]
    )
    assert train(model(False), rows, 2, max_steps=1, **arguments).message == (
        "columns not used: 'early', 'id'; 2 rows held out for evaluation · columns not used: 'late'"
    )


def test_rows_to_evaluate_on_are_held_to_the_same(tokenizer: Any) -> None:
    rows = [{"text": "the cat", "id": 1}, {"text": None}]
    result = train(model(False), [{"text": "a cat"}], rows, tokenizer=tokenizer, max_steps=1, learning_rate=1e-3)
    assert result.message == (
        "evaluation rows: 1 row left out: row 1: the text is empty; columns not used: 'id' (1 of 2 rows)"
    )
