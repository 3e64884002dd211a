"""How rows are read: which turns of a chat are learned, and what happens to reasoning and to long rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nbpeft.checkpoint.prompt_format import NOT_FOR_TEMPLATES
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.names import ROW_CHOICES
from nbpeft.training.data.forms import TAGGED, TEXT, Chat, Compared, Example, Form, Pair, Prompted
from nbpeft.training.data.left_out import MESSAGES, UnusedParts
from nbpeft.training.data.row import WEIGHT, is_nothing

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message in which chat templates expect reasoning."""
REASONING = "reasoning"
"""The name of reasoning among the parts of a row that are not used."""
_REASONING = (MESSAGES, REASONING)
MASKED_REASONING = ("read, but not learned", REASONING)
"""The reason and the name of reasoning that is masked."""
_BLOCK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
"""Reasoning at the beginning of a content."""


@dataclass(frozen=True)
class RowOptions:
    """How rows are read, apart from their columns and length.

    Attributes:
        learn: the turns of the assistant to learn: ``all``, the ``last`` one, or the ``completion``: all turns that
            follow the last message of the user.
        reasoning: reasoning of the assistant: ``keep`` it and learn it, ``mask`` it: read but not learned, or ``drop``
            it.
        long: rows longer than the maximum length: ``cut`` them, ``drop`` them, or ``split`` them into several rows.
        chat_template_kwargs: variables for the chat template.

    Raises:
        ConfigError: a value is invalid.
    """

    learn: str = "all"
    reasoning: str = "keep"
    long: str = "cut"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, choices in ROW_CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise ConfigError(f"{name} must be {', '.join(choices)}, not {value!r:.40}.{hint}", field=name)
        object.__setattr__(self, "chat_template_kwargs", self.chat_template_kwargs or {})
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ConfigError(
                "chat_template_kwargs must be a dictionary like {'enable_thinking': False}, not "
                f"{self.chat_template_kwargs!r:.60}",
                field="chat_template_kwargs",
            )

    def check(self, form: Form | None, example: Example | None, template: str) -> None:
        """Refuses options without effect on rows of a form.

        Args:
            form: the form of the rows; None if they are tokenized.
            example: the first row; None if it is unknown.
            template: the text of the chat template.

        Raises:
            ConfigError: an option would have no effect, or the template has no such variable.
        """
        what = "tokenized rows" if form is None else f"rows with {form.name}"
        if self.long == "split" and form not in (TEXT, TAGGED):
            raise ConfigError(
                f"long='split' is for rows with text or with {TAGGED.name}, and these are {what}, whose "
                "parts would lack their beginning: "
                "long='drop' leaves out those that are too long",
                field="long",
            )
        if self.long != "cut" and form is None:
            raise ConfigError("long has no effect: tokenized rows are used whole", field="long")
        for name, value, default in (("learn", self.learn, "all"), ("reasoning", self.reasoning, "keep")):
            if isinstance(example, Prompted) and value not in (default, "drop"):
                raise ConfigError(f"{name} has no effect: generated completions are learned whole", field=name)
        example = example.chosen if isinstance(example, Compared) else example
        example = example.prompt if isinstance(example, Prompted) and isinstance(example.prompt, Chat) else example
        if isinstance(example, Chat) or (form is not None and example is None):
            why = why_not_used(self.chat_template_kwargs, template)
            if why:
                raise ConfigError(f"chat_template_kwargs: {why}", field="chat_template_kwargs")
            return
        usual = RowOptions()
        for name in ("learn", "reasoning", "chat_template_kwargs"):
            one_completion = name == "learn" and isinstance(example, Pair)
            if getattr(self, name) != getattr(usual, name) and not one_completion:
                raise ConfigError(f"{name} is for conversations in a chat template, and these are {what}", field=name)

    def applied(self, example: Example) -> Example:
        """An example as it is read with these options.

        Args:
            example: a row, as it is written.
        """
        if isinstance(example, Compared):
            return Compared(*(self.applied(part) for part in (example.chosen, example.rejected)))  # type: ignore[arg-type]
        if isinstance(example, Prompted):
            return Prompted(self.applied(example.prompt)) if isinstance(example.prompt, Chat) else example  # type: ignore[arg-type]
        if not isinstance(example, Chat):
            return example
        chat = replace(example, template={**self.chat_template_kwargs, **example.template})
        if self.reasoning == "drop":
            chat = replace(chat, messages=tuple(map(_without_reasoning, chat.messages)))
        if any(map(has_reasoning, example.messages)):
            dropped = (REASONING,) if self.reasoning == "drop" else ()
            chat = replace(chat, masks=self.reasoning == "mask", unused=(*chat.unused, *dropped))
        return self._learning(chat)

    def lines(self, unused: UnusedParts) -> tuple[str, ...]:
        """A line about an option that had no effect on any row.

        Args:
            unused: the parts of the rows that are not trained on.
        """
        if self.reasoning == "keep" or _REASONING in unused or MASKED_REASONING in unused:
            return ()
        return (f"no row has reasoning to {self.reasoning}",)

    def _learning(self, chat: Chat) -> Chat:
        """The chat whose first messages are context, up to the first one that ``learn`` chooses."""
        if self.learn == "all":
            return chat
        role = "assistant" if self.learn == "last" else "user"
        places = [place for place, message in enumerate(chat.messages) if message["role"] == role]
        first = max([chat.first, *((place if role == "assistant" else place + 1) for place in places[-1:])])
        weighted = any(weight not in (0, 1) for weight in chat.weights[chat.first : first])
        unused = [f"{WEIGHT!r} of turns that are not learned (learn={self.learn!r})"] if weighted else []
        return replace(chat, first=first, unused=(*chat.unused, *unused))


def why_not_used(kwargs: Mapping[str, Any], template: str) -> str:
    """Why variables cannot be given to a chat template; empty if they can.

    Args:
        kwargs: name of a variable -> its value.
        template: the text of the template.
    """
    known = sorted({*re.findall(r"[^\W\d]\w*", template)})
    for name in kwargs:
        if name in NOT_FOR_TEMPLATES:
            return f"{name!r} is not a variable of a chat template; it follows from the rows"
        if name not in known:
            return f"the chat template has no variable {name!r:.40}.{did_you_mean(str(name), known)}"
    return ""


def reasoning_end(message: Mapping[str, Any]) -> int:
    """The place in the content of a message at which its answer begins, after reasoning and blanks.

    Args:
        message: a message.
    """
    content = text_of(message)
    block = _BLOCK.match(content)
    return len(content) - len(content.lstrip()) if block is None else block.end()


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Whether a message of the assistant has reasoning."""
    if message["role"] != "assistant":
        return False
    return any(not is_nothing(message.get(key)) for key in REASONING_KEYS) or _BLOCK.match(text_of(message)) is not None


def text_of(message: Mapping[str, Any]) -> str:
    """The content of a message, of several parts the first one; empty if it has none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else content[0]["text"]


def with_text(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A message with another content, of several parts with another first one."""
    content = message.get("content")
    parts = isinstance(content, list | tuple) and content
    return {**message, "content": [{**content[0], "text": text}, *content[1:]] if parts else text}  # type: ignore[index]


def _without_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not has_reasoning(message):
        return message
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return with_text(rest, text_of(rest)[reasoning_end(rest) :]) if _BLOCK.match(text_of(rest)) else rest
