"""The prompts of samples: conversations, and rows with their wanted answers."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import ConfigError
from nbpeft.training import train
from tests.char_tokenizer import CharTokenizer
from tests.training.support import trainable

SETTINGS: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "tokenizer": CharTokenizer("template")}


def chat(number: int) -> dict[str, Any]:
    pairs = [("system", "Be brief"), ("user", f"Q{number}"), ("assistant", f"A{number}")]
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


ROWS = [chat(number) for number in range(6)]


class Spy(CharTokenizer):
    """Records the texts it tokenizes."""

    def __init__(self) -> None:
        super().__init__("template")
        self.seen: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.seen.append(text)
        return super().__call__(text)


def samples(rows: Any, **options: Any) -> list[tuple[str, str]]:
    state = train(trainable(), rows, **{**SETTINGS, **options}).state
    return [(sample.prompt, sample.wanted) for sample in state.samples]


def test_a_number_asks_held_out_rows_and_shows_the_wanted_answers() -> None:
    tokenizer = Spy()
    found = samples(ROWS, eval_data=3, sample=2, tokenizer=tokenizer)
    held_out = {row["messages"][1]["content"] for row in ROWS}
    assert len(found) == 2 and all(
        prompt in held_out and wanted == prompt.replace("Q", "A") for prompt, wanted in found
    )
    assert all(f"<Be brief><{prompt}>" in tokenizer.seen for prompt, _ in found)
    result = train(trainable(), ROWS, eval_data=3, sample=2, **SETTINGS)
    assert "sampled prompts have the system prompt 'Be brief'" in result.message
    assert "held out" in result.message and "the sampled prompts are training rows" not in result.message


def test_rows_to_evaluate_on_are_asked_without_those_that_are_left_out() -> None:
    evaluation = [{"prompt": "a", "completion": ""}, {"prompt": "b ", "completion": " c"}]
    rows = [{"prompt": "x", "completion": "y"}] * 2
    assert samples(rows, eval_data=evaluation, sample=3) == [("b ", "c")]


def test_without_evaluation_rows_training_rows_are_asked_and_named() -> None:
    result = train(trainable(), ROWS, sample=2, **SETTINGS)
    assert [sample.wanted for sample in result.state.samples] == ["A0", "A1"]
    assert "the sampled prompts are training rows: no rows are held out" in result.message


def test_prompts_get_the_system_prompt_of_the_rows() -> None:
    tokenizer = Spy()
    samples(ROWS, sample=["Hi", ROWS[0]["messages"][:2]], tokenizer=tokenizer)
    assert {"<Be brief><Hi>", "<Be brief><Q0>"} <= set(tokenizer.seen)


def test_a_conversation_with_an_answer_is_asked_without_it() -> None:
    assert samples(ROWS, sample=ROWS[3]["messages"]) == [("Q3", "A3")]


@pytest.mark.parametrize(
    ("rows", "sample", "words"),
    [
        ([{"text": "a"}] * 2, 2, "none of the training rows has both"),
        (ROWS, 0, "1 to 8 prompts, not 0"),
        (ROWS, True, "sample must be a prompt"),
        (ROWS, [["a"]], "sample must be a prompt"),
    ],
)
def test_what_cannot_be_asked_is_one_line(rows: Any, sample: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(trainable(), rows, sample=sample, **SETTINGS)


def test_a_number_asks_the_prompts_of_preferences_with_the_chosen_answers() -> None:
    rows = [{"prompt": f"q{number} ", "chosen": " yes", "rejected": " no"} for number in range(3)]
    assert samples(rows, sample=2) == [("q0 ", "yes"), ("q1 ", "yes")]


def test_bad_completions_are_no_wanted_answers() -> None:
    rows = [{"prompt": f"q{number} ", "completion": " x", "label": bool(number % 2)} for number in range(4)]
    assert samples(rows, sample=4) == [("q1 ", "x"), ("q3 ", "x")]
