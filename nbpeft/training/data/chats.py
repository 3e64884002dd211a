"""Chats become text with the turns of the assistant marked; what a template leaves out of them is known."""

from __future__ import annotations

import itertools
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
        self._end_mark = ""
        """What followed the content of an earlier turn that is nothing but content."""

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
        for number in turns:
            found = self._span(chat, text, number)
            if found is None:
                raise TrainingError(f"The chat template does not show turn {number} of the assistant as it is written.")
            yield Span(*found, chat.weights[number])

    def _span(self, chat: Chat, text: str, number: int) -> tuple[int, int] | None:
        """From the end of the prompt for a turn to the end of the turn."""
        before = self._text(chat.messages[:number], chat.tools, prompt=True) if number else ""
        through = self._text(chat.messages[: number + 1], chat.tools)
        if through.startswith(before) and text.startswith(through):
            return len(before), len(through)
        # The template writes an earlier turn otherwise than the last one.
        first = len(before) if text.startswith(before) else self._start(chat, text, number, before)
        if first is None:
            return None
        after = self._after_content(chat.messages[number], text, first)
        if after is not None and self._end_mark and text.startswith(self._end_mark, after):
            return first, after + len(self._end_mark)
        last = self._end(chat, text, number, through)
        if last is None or first >= last:
            return None
        if after is not None:
            self._end_mark = text[after:last]
        return first, last

    def _after_content(self, message: Message, text: str, first: int) -> int | None:
        """Where the content of a turn ends that is nothing else, if the turn begins with it."""
        content = message.get("content") if message.keys() == {"role", "content"} else None
        if not isinstance(content, str) or not content or not text.startswith(content, first):
            return None
        return first + len(content)

    def _start(self, chat: Chat, text: str, number: int, before: str) -> int | None:
        """Where the generation prompt of a turn ends, found from the beginning or from a message before the turn."""
        plain = self._text(chat.messages[:number], chat.tools)
        opening = len(before) - len(plain) if before.startswith(plain) else 0
        following = (self._following(chat, text, previous, before, number) for previous in reversed(range(number)))
        for found in itertools.chain([(text, before)], following):
            if found is None:
                continue
            rest, prompt = found
            agreed = _agreement(rest, prompt)
            place = len(text) - len(rest) + agreed
            if agreed == len(prompt):
                return place
            if len(prompt) - agreed <= opening:  # it opens a thinking block, and the turn has none or another one
                return min(place, self._content_start(chat, text, number, place))
        return None

    def _content_start(self, chat: Chat, text: str, number: int, default: int) -> int:
        """Where the text is another one if a turn has other content."""
        mark = _new_mark(text)
        messages = list(chat.messages)
        messages[number] = {**messages[number], "content": mark}
        try:
            same, found, _ = self._text(messages, chat.tools).partition(mark)
        except Exception:  # a template that refuses the content
            return default
        return len(same) if found and text.startswith(same) else default

    def _end(self, chat: Chat, text: str, number: int, through: str) -> int | None:
        """Where a turn ends, its end-of-turn mark included."""
        found = self._following(chat, text, number, through)
        if found is None:
            return None
        rest, ending = found
        place = len(text) - len(rest)
        closed = ending.rstrip()
        if closed and rest.startswith(closed):
            return place + len(closed)
        # The last turn may have another end-of-turn mark than an earlier one, or none.
        specials = self._special_tokens()
        shared = closed.removesuffix(next((token for token in specials if closed.endswith(token)), ""))
        if not rest.startswith(shared):
            return None
        mark = next((token for token in specials if rest.startswith(token, len(shared))), "")
        return place + len(shared) + len(mark)

    def _following(
        self, chat: Chat, text: str, number: int, beginning: str, prompt_for: int | None = None
    ) -> tuple[str, str] | None:
        """What follows the same place of a message in the text of a chat and in that of its beginning.

        The place is marked in the message and both are rendered again: it counts if the mark is all that is new.

        Args:
            chat: the chat.
            text: all of it.
            number: of the message.
            beginning: the text of the messages up to and with it, or before ``prompt_for``.
            prompt_for: number of the turn whose generation prompt ends the beginning.
        """
        mark = _new_mark(text + beginning)
        count = number + 1 if prompt_for is None else prompt_for
        message = chat.messages[number]
        keys = sorted((key for key in message if key != "role"), key=lambda key: key != "content")
        for marked in _marked({key: message[key] for key in keys}, mark):
            messages = [*chat.messages[:number], {"role": message["role"], **marked}, *chat.messages[number + 1 :]]
            rest = self._after(mark, text, messages, chat.tools)
            if rest is None:
                continue
            short = self._after(mark, beginning, messages[:count], chat.tools, prompt=prompt_for is not None)
            if short is not None:
                return rest, short
        return None

    def _after(
        self, mark: str, text: str, messages: Sequence[Message], tools: Any, *, prompt: bool = False
    ) -> str | None:
        """What follows a mark in the text of messages; None if the text has more to it than the mark."""
        try:
            before, found, after = self._text(messages, tools, prompt=prompt).partition(mark)
        except Exception:  # a template that refuses the marked value
            return None
        return after if found and before + after == text else None

    def _special_tokens(self) -> list[str]:
        """The special tokens, the longest first."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        tokens = {token.content for token in added if token.special} | {getattr(self._tokenizer, "eos_token", None)}
        return sorted((token for token in tokens if token), key=len, reverse=True)

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


def _new_mark(text: str) -> str:
    """A mark that a text does not have: of a control character, which JSON does not escape."""
    return next(mark for number in itertools.count() if (mark := f"\x7f{number}\x7f") not in text)


def _agreement(one: str, other: str) -> int:
    """How many letters two texts begin alike with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _marked(value: Any, mark: str) -> Iterator[Any]:
    """Copies of a value, each with a mark behind one of its texts."""
    if isinstance(value, str):
        end = len(value.rstrip())  # templates may strip
        yield value[:end] + mark + value[end:]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from ({**value, key: marked} for marked in _marked(item, mark))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from ([*value[:place], marked, *value[place + 1 :]] for marked in _marked(item, mark))


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
