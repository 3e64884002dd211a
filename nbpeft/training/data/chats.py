"""Chats become text with the turns of the assistant marked; what a template leaves out of them is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbpeft.errors import TrainingError
from nbpeft.training.data.encoding import Span
from nbpeft.training.data.forms import Chat
from nbpeft.training.data.row import is_nothing

Message = Mapping[str, Any]
Part = tuple[int, str]
"""The number of a message, and one of its keys; -1 and ``tools`` for the tools of a chat."""

_TOOLS: Part = (-1, "tools")
_SURE = 16
"""Letters of a text that stands in a rendered chat by no accident."""
_DEPTH = 3
"""How deep a value is looked into for what it is made of."""
_MOST_SHAPES = 10_000
"""Combinations of roles and keys that are remembered."""


@dataclass(frozen=True)
class RenderedChat:
    """A chat as a model reads it.

    Attributes:
        text: all of it.
        spans: where the assistant speaks and is learned, end-of-turn marks included.
        left_out: what of the chat the template does not print.
        missing: why nothing is learned from it; empty if something is.
    """

    text: str
    spans: tuple[Span, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: str = ""


class ChatRenderer:
    """Renders chats with the chat template of a tokenizer.

    What a template prints depends on the roles and keys of the messages: it is tried once for each combination, by
    rendering the chat without one thing after the other.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._left_out: dict[Any, frozenset[Part]] = {}
        self._takes_parts: bool | None = None

    def render(self, chat: Chat) -> RenderedChat:
        """The text of a chat, and what is learned of it.

        Raises:
            TrainingError: there is no template, or it shows a turn of the assistant otherwise than it is written.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise TrainingError(
                "The tokenizer has no chat template: set tokenizer.chat_template, or give rows with prompt and "
                "completion."
            )
        if not chat.messages:
            return RenderedChat("", missing="it has no messages")
        turns = [number for number in range(chat.first, len(chat.messages)) if _speaks(chat.messages[number])]
        if not turns:
            roles = sorted({str(message["role"]) for message in chat.messages[chat.first :]})
            return RenderedChat("", missing=f"no turn of the assistant (roles: {', '.join(roles) or 'none'})")
        chat = replace(chat, messages=tuple(self._flat(message) for message in chat.messages))
        text = self._text(chat.messages, chat.tools)
        hidden = self._hidden(chat, text)
        names = tuple(dict.fromkeys(_name(chat, part) for part in sorted(hidden)))
        if any(chat.weights[turn] and _says_nothing(chat.messages[turn], turn, hidden) for turn in turns):
            return RenderedChat(text, (), names, "a turn of the assistant is empty")
        spans = self._spans(chat, text, turns)
        learned = tuple(span for span in spans if span.weight)
        return RenderedChat(text, learned, names, "" if learned else "the weights of its turns are 0")

    def _text(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        options = {} if tools is None else {"tools": tools}
        return str(
            self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **options)
        )

    # Where the assistant speaks

    def _spans(self, chat: Chat, text: str, turns: Sequence[int]) -> Iterator[Span]:
        cursor = 0
        for number, message in enumerate(chat.messages):
            found = None
            if number in turns:
                found = self._by_rendering(chat, text, number) or self._by_content(text, message, cursor)
                if found is None:
                    raise TrainingError(
                        f"The chat template does not show turn {number} of the assistant as it is written."
                    )
                yield Span(*found, chat.weights[number])
            content = message.get("content")
            if found is None and isinstance(content, str) and (place := text.find(content, cursor)) >= 0:
                found = place, place + len(content)
            cursor = cursor if found is None else found[1]

    def _by_rendering(self, chat: Chat, text: str, number: int) -> tuple[int, int] | None:
        """From the end of the prompt for a turn to the end of the chat up to and with it."""
        before = self._text(chat.messages[:number], chat.tools, prompt=True) if number else ""
        through = self._text(chat.messages[: number + 1], chat.tools)
        if through.startswith(before) and text.startswith(through):
            return len(before), len(through)
        return None

    def _by_content(self, text: str, message: Message, cursor: int) -> tuple[int, int] | None:
        """For templates that rewrite earlier turns: where the content stands, and the mark after it."""
        content = message.get("content")
        if not isinstance(content, str) or not content:
            return None
        start = text.find(content, cursor)
        if start < 0:
            return None
        end = start + len(content)
        mark = getattr(self._tokenizer, "eos_token", None)
        return start, end + len(mark) if mark and text.startswith(mark, end) else end

    # What the template leaves out

    def _hidden(self, chat: Chat, text: str) -> frozenset[Part]:
        """The parts of a chat that its text would be the same without."""
        parts = _parts(chat)
        roles = tuple(message["role"] for message in chat.messages)
        shape = roles, tuple((part, _shape(value)) for part, value in parts.items())
        known = self._left_out.get(shape)
        if known is None:
            if len(self._left_out) == _MOST_SHAPES:
                self._left_out.clear()
            known = frozenset(part for part in parts if self._is_hidden(chat, text, part))
            self._left_out[shape] = known
            return known
        doubtful = {  # a text that stands there though it should not, or the other way round
            part
            for part, value in parts.items()
            if isinstance(value, str) and len(value.strip()) >= _SURE and (value.strip() in text) is (part in known)
        }
        return known - doubtful | {part for part in doubtful if self._is_hidden(chat, text, part)}

    def _is_hidden(self, chat: Chat, text: str, part: Part) -> bool:
        """Whether the text of a chat is the same without a part."""
        number, key = part
        messages = list(chat.messages)
        if part != _TOOLS:
            rest = {name: value for name, value in messages[number].items() if name != key}
            messages[number] = {**rest, "content": ""} if key == "content" else rest
        try:
            return self._text(messages, None if part == _TOOLS else chat.tools) == text
        except Exception:  # a template that cannot do without it
            return False

    # Content of several parts

    def _flat(self, message: Message) -> Message:
        """A message whose parts are one text, unless the template goes through parts."""
        content = message.get("content")
        if not isinstance(content, (list, tuple)):
            return message
        if self._takes_parts is None:
            self._takes_parts = self._tries_parts()
        if self._takes_parts:
            return message
        return {**message, "content": "\n".join(part["text"] for part in content)}

    def _tries_parts(self) -> bool:
        mark = "one part of several"
        try:
            text = self._text([{"role": "user", "content": [{"type": "text", "text": mark}]}], None)
        except Exception:  # a template that takes no list
            return False
        return mark in text and "'text'" not in text and '"text"' not in text


def _speaks(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _says_nothing(message: Message, number: int, hidden: frozenset[Part]) -> bool:
    """Whether of a turn only its end could be learned."""
    printed = [key for key, value in message.items() if key != "role" and not is_nothing(value)]
    return all((number, key) in hidden or (key == "content" and _is_blank(message[key])) for key in printed)


def _is_blank(content: Any) -> bool:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return not any(text.strip() for text in texts)


def _parts(chat: Chat) -> dict[Part, Any]:
    """What a chat holds beside roles, by where it is."""
    found: dict[Part, Any] = {
        (number, key): value
        for number, message in enumerate(chat.messages)
        for key, value in message.items()
        if key != "role" and not is_nothing(value)
    }
    return found if chat.tools is None else {**found, _TOOLS: chat.tools}


def _shape(value: Any, depth: int = _DEPTH) -> Any:
    """What a value is made of, whatever it says."""
    if isinstance(value, Mapping) and depth:
        return tuple(sorted((str(key), _shape(item, depth - 1)) for key, item in value.items()))
    if isinstance(value, (list, tuple)) and depth:
        return tuple(_shape(item, depth - 1) for item in value)
    return type(value).__name__


def _name(chat: Chat, part: Part) -> str:
    number, key = part
    return f"'content' of {chat.messages[number]['role']} messages" if key == "content" else repr(key)
