"""``--system``, and prompts that are variables with conversations."""

from __future__ import annotations

from typing import Any

import pytest

from tests.char_tokenizer import CharTokenizer
from tests.magics.notebook import Notebook
from tests.tiny_models import randomize

SHORT = "--max-new-tokens 3"


def chat(question: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.fixture
def ready(adapted: Notebook) -> Notebook:
    randomize(adapted["model"], "sql", 1)
    randomize(adapted["model"], "chat", 2)
    adapted["rows"] = [{"messages": chat(f"Q{number}")} for number in range(4)]
    adapted["talk"], adapted["text"] = chat("Hi")[:-1], "Hello"
    adapted["tokenizer"] = CharTokenizer("yes")
    return adapted


def test_the_system_prompt_is_an_option(ready: Notebook) -> None:
    ready.do("%lora_train model --data rows --no-keep max_steps=1")
    assert ready.do(f'%lora ask "Hi" {SHORT}').system == "Be brief"
    assert ready.do(f'%lora ask "Hi" --system "Sing loud" {SHORT}').system == "Sing loud"
    assert ready.do(f'%lora ask "Hi" --system "" {SHORT}').system == ""
    assert ready.do(f"%lora ask Hi --system text {SHORT}").system == "Hello"
    compared = ready.do(f'%lora compare "Hi" --system Sing {SHORT}')
    assert {column.system for column in compared.columns} == {"Sing"}
    assert "not applied here (--chat)" in ready.run(f'%lora ask "Hi" --system Sing --no-chat {SHORT}').line


@pytest.mark.parametrize("word", ["talk", "{talk}", "$talk", 'rows[0]["messages"][:-1]', "rows[0]['messages'][:2]"])
def test_a_variable_with_messages_is_asked(ready: Notebook, word: str) -> None:
    asked = ready.do(f"%lora ask {word} {SHORT}")
    assert asked.system == "Be brief" and asked.prompt in ("Hi", "Q0")
    assert ready.do(f"%lora compare {word} {SHORT}").prompts == (asked.prompt,)


def test_a_list_of_conversations_is_compared(ready: Notebook) -> None:
    ready["talks"] = [ready["talk"], "plain"]
    assert ready.do(f"%lora compare talks {SHORT}").prompts == ("Hi", "plain")
    assert ready.do(f"%lora compare --prompts talk {SHORT}").prompts == ("Hi",)
    assert "takes several" in ready.run(f"%lora ask talks {SHORT}").line


def test_text_stays_text(ready: Notebook) -> None:
    assert ready.do(f'%lora ask "talk" {SHORT}').prompt == "talk"
    assert ready.do(f"%lora ask unknown {SHORT}").prompt == "unknown"
    assert ready.do(f"%lora ask text {SHORT}").prompt == "Hello"
    assert "as a text it is quoted" in ready.run(f"%lora ask model {SHORT}").line
    assert "--panel takes a prompt as text" in ready.run(f"%lora compare talk --panel {SHORT}").line


def test_samples_are_conversations_or_rows(ready: Notebook) -> None:
    line = "%lora_train model --data rows --no-keep max_steps=1"
    assert [item.prompt for item in ready.do(f"{line} --sample talk --sample more").state.samples] == ["Hi", "more"]
    rows = ready.do(f"{line} --sample 2 --eval-data 2").state.samples
    assert [item.wanted for item in rows] == ["yes", "yes"]
    assert "takes either a number of rows or prompts, not both" in ready.run(f"{line} --sample 2 --sample talk").line
