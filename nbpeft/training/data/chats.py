"""Chats become text with the turns of the assistant marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbpeft.errors import TrainingError
from nbpeft.training.data.encoding import Span


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, first: int = 0, tools: Any = None
) -> tuple[str, list[Span]]:
    """Renders messages with the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer of transformers that has a chat template.
        messages: Dictionaries with ``role`` and ``content``.
        first: Messages before this one are not learned.
        tools: Handed on to the template.

    Returns:
        The text, and where in it the assistant speaks, end-of-turn marks included.

    Raises:
        TrainingError: there is no template, or no turn of the assistant.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TrainingError(
            "The tokenizer has no chat template: set tokenizer.chat_template, or give rows with prompt and completion."
        )
    turns = [index for index in range(first, len(messages)) if messages[index].get("role") == "assistant"]
    if not turns:
        roles = sorted({str(message.get("role")) for message in messages})
        raise TrainingError(f"No turn of the assistant to learn from; the roles found are {', '.join(roles)}.")

    def render(count: int, prompt: bool = False) -> str:
        options = {} if tools is None else {"tools": tools}
        return str(
            tokenizer.apply_chat_template(
                list(messages[:count]), tokenize=False, add_generation_prompt=prompt, **options
            )
        )

    text = render(len(messages))
    spans, cursor = [], 0
    for index in turns:
        span = _by_rendering(render, text, index) or _by_content(tokenizer, text, messages[index], cursor)
        if span is None:
            raise TrainingError(f"The chat template does not show turn {index} of the assistant as it is written.")
        spans.append(span)
        cursor = span[1]
    return text, spans


def _by_rendering(render: Any, text: str, index: int) -> Span | None:
    """From the end of the prompt for a turn to the end of the chat up to and with it."""
    before = render(index, prompt=True) if index else ""
    through = render(index + 1)
    if through.startswith(before) and text.startswith(through):
        return len(before), len(through)
    return None


def _by_content(tokenizer: Any, text: str, message: Mapping[str, Any], cursor: int) -> Span | None:
    """For templates that rewrite earlier turns: where the content stands, and the mark after it."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return None
    start = text.find(content, cursor)
    if start < 0:
        return None
    end = start + len(content)
    mark = getattr(tokenizer, "eos_token", None)
    return start, end + len(mark) if mark and text.startswith(mark, end) else end
