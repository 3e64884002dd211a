"""A tokenizer whose tokens are characters, for the tiny models of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FIRST, PAD, END = 32, 95, 96


class CharTokenizer:
    """Printable characters as tokens 0..94; they fit the tiny models' vocabulary.

    Args:
        chat_template: a true value makes it wrap conversations as ``<content>``.
    """

    pad_token_id = PAD
    eos_token_id = END

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) - FIRST for character in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token + FIRST) for token in tokens if token < PAD)

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert self.chat_template and not tokenize
        return "".join(f"<{message['content']}>" for message in messages)
