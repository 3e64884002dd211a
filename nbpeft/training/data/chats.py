"""Renders chats as text with the assistant's turns marked, and finds the parts that a chat template does not print."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbpeft.errors import TrainingError
from nbpeft.training.data.anchors import (
    Extent,
    KnownTurns,
    Message,
    marked_copies,
    new_mark,
    places_of_contents,
    printed,
)
from nbpeft.training.data.encoding import Span
from nbpeft.training.data.forms import Chat
from nbpeft.training.data.options import REASONING_KEYS, has_reasoning, reasoning_end, text_of, with_text
from nbpeft.training.data.row import is_nothing

Part = tuple[int, str]
"""The index of a message and one of its keys; -1 and ``tools`` for the tools of a chat."""

_TOOLS: Part = (-1, "tools")
_LONG = 8
"""The number of messages from which the parts of a chat are searched together instead of one by one."""
_SURE = 16
"""The length, in characters, from which a text that occurs in a rendered chat is not there by coincidence."""
_DEPTH = 3
"""The depth to which the structure of nested values is compared."""
_MOST_SHAPES = 10_000
"""The greatest number of combinations of roles and keys in the cache."""


@dataclass(frozen=True)
class RenderedChat:
    """A chat as a model reads it.

    Attributes:
        text: the whole chat.
        spans: the assistant's turns to train on, including their end-of-turn tokens.
        left_out: the parts of the chat that the template does not print.
        missing: why there is nothing to train on; empty if there is something.
    """

    text: str
    spans: tuple[Span, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: str = ""


class ChatRenderer:
    """Renders chats with the chat template of a tokenizer.

    What a template prints depends on the roles and keys of the messages: each combination is tried once, by rendering
    the chat without one part after the other.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._left_out: dict[Any, frozenset[Part]] = {}
        self._takes_parts: bool | None = None
        self._end_mark = ""
        """The text that followed the content of an earlier turn with nothing but content."""

    def render(self, chat: Chat) -> RenderedChat:
        """Renders a chat and finds the parts to train on.

        Raises:
            TrainingError: there is no template, or it changes the text of a turn of the assistant.
        """
        self._check_template()
        if not chat.messages:
            return RenderedChat("", missing="it has no messages")
        turns = [number for number in range(chat.first, len(chat.messages)) if _speaks(chat.messages[number])]
        if not turns:
            roles = sorted({str(message["role"]) for message in chat.messages[chat.first :]})
            return RenderedChat("", missing=f"no turn of the assistant (roles: {', '.join(roles) or 'none'})")
        chat = replace(chat, messages=tuple(self._flat(message) for message in chat.messages))
        text = self._text(chat.messages, chat.variables)
        places = self._places(chat, text)
        hidden = self._hidden(chat, text, places)
        names = tuple(dict.fromkeys(_name(chat, part) for part in sorted(hidden)))
        if any(chat.weights[turn] and _says_nothing(chat.messages[turn], turn, hidden) for turn in turns):
            return RenderedChat(text, (), names, "a turn of the assistant is empty")
        spans = self._spans(chat, text, turns, places)
        learned = tuple(span for span in spans if span.weight)
        return RenderedChat(text, learned, names, "" if learned else "the weights of its turns are 0")

    def prompt(self, chat: Chat) -> str:
        """The text of a whole chat, with the generation prompt.

        Raises:
            TrainingError: there is no template.
        """
        self._check_template()
        return self._text(tuple(self._flat(message) for message in chat.messages), chat.variables, prompt=True)

    def _check_template(self) -> None:
        if not getattr(self._tokenizer, "chat_template", None):
            raise TrainingError(
                "The tokenizer has no chat template: set tokenizer.chat_template, or give rows with prompt and "
                "completion."
            )

    def last_turn(self, chat: Chat) -> tuple[str, str]:
        """The text of a chat up to its last turn of the assistant, with the generation prompt; and that turn.

        Args:
            chat: the chat.

        Returns:
            The text before the turn, and the turn with its end-of-turn token; without such a turn, the text of the
            whole chat and the empty string.

        Raises:
            TrainingError: the template changes the text of the turn.
        """
        messages = tuple(self._flat(message) for message in chat.messages)
        number = max((place for place, message in enumerate(messages) if _speaks(message)), default=None)
        if number is None:
            return self._text(messages, chat.variables, prompt=True), ""
        through = replace(chat, messages=messages[: number + 1], weights=(1.0,) * (number + 1))
        text = self._text(through.messages, chat.variables)
        (span,) = self._spans(through, text, [number], {})
        before = self._text(messages[:number], chat.variables, prompt=True) if number else ""
        return before, text[span.first : span.last]

    def _text(self, messages: Sequence[Message], variables: Mapping[str, Any], *, prompt: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": prompt, **variables}
        return str(self._tokenizer.apply_chat_template(list(messages), **options))

    # The spans of the assistant's turns

    def _places(self, chat: Chat, text: str) -> dict[int, Extent]:
        """The places of the contents of a long chat in its text."""
        if len(chat.messages) < _LONG:
            return {}
        return places_of_contents(chat.messages, text, lambda messages: self._text(messages, chat.variables))

    def _spans(self, chat: Chat, text: str, turns: Sequence[int], places: Mapping[int, Extent]) -> Iterator[Span]:
        known = KnownTurns(chat.messages, text, places)
        for number in turns:
            span = known.find(number)
            if span is None:
                span = self._span(chat, text, number)
                if span is None:
                    raise TrainingError(
                        f"The chat template does not show turn {number} of the assistant as it is written."
                    )
                known.add(number, span)
            first, last = span
            if chat.masks and has_reasoning(chat.messages[number]):
                first = self._answer_start(chat, text, number, first)
            yield Span(first, last, chat.weights[number])

    def _answer_start(self, chat: Chat, text: str, number: int, first: int) -> int:
        """The position at which a turn's answer or tool call begins, after its reasoning.

        Args:
            chat: the chat.
            text: its text.
            number: the index of the turn.
            first: the end of its generation prompt.

        Raises:
            TrainingError: the template does not print the reasoning before the rest.
        """
        mark, message = new_mark(text), chat.messages[number]
        content, place = text_of(message), reasoning_end(message)

        def around(changed: Message) -> tuple[str, str, str]:
            messages = [*chat.messages[:number], changed, *chat.messages[number + 1 :]]
            return self._text(messages, chat.variables).partition(mark)

        start, found, rest = around(with_text(message, content[:place] + mark + content[place:]))
        shown = found and (start + rest == text or (not content and text.startswith(start)))
        ends = [around({**message, key: mark}) for key in REASONING_KEYS if not is_nothing(message.get(key))]
        if shown and first <= len(start) and not any(end and len(before) >= len(start) for before, end, _ in ends):
            return len(start)
        raise TrainingError(
            f"The chat template does not print the reasoning of turn {number} before its answer, so that it cannot be "
            "masked."
        )

    def _span(self, chat: Chat, text: str, number: int) -> tuple[int, int] | None:
        """The span of a turn: from the end of its generation prompt to the end of the turn."""
        before = self._text(chat.messages[:number], chat.variables, prompt=True) if number else ""
        through = self._text(chat.messages[: number + 1], chat.variables)
        if through.startswith(before) and text.startswith(through):
            return len(before), len(through)
        # The template renders an earlier turn differently from the last one, e.g. without its reasoning.
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
        """The end of the content of a turn that has no other keys, if the turn begins with it; else None."""
        content = message.get("content") if message.keys() == {"role", "content"} else None
        if not isinstance(content, str) or not content or not text.startswith(content, first):
            return None
        return first + len(content)

    def _start(self, chat: Chat, text: str, number: int, before: str) -> int | None:
        """The end of a turn's generation prompt, searched from the start of the chat or from an earlier message."""
        plain = self._text(chat.messages[:number], chat.variables)
        opening = len(before) - len(plain) if before.startswith(plain) else 0
        following = (self._following(chat, text, previous, before, number) for previous in reversed(range(number)))
        for rests in itertools.chain([(text, before)], following):
            if rests is None:
                continue
            rest, prompt = rests
            agreed = _agreement(rest, prompt)
            place = len(text) - len(rest) + agreed
            if agreed == len(prompt):
                return place
            if (
                len(prompt) - agreed <= opening
            ):  # the prompt opens a thinking block, and the turn has none or another one
                return min(place, self._content_start(chat, text, number, place))
        return None

    def _content_start(self, chat: Chat, text: str, number: int, default: int) -> int:
        """The position from which the text changes if the content of a turn changes."""
        mark = new_mark(text)
        messages = list(chat.messages)
        messages[number] = {**messages[number], "content": mark}
        try:
            same, found, _ = self._text(messages, chat.variables).partition(mark)
        except Exception:  # a template that refuses the content
            return default
        return len(same) if found and text.startswith(same) else default

    def _end(self, chat: Chat, text: str, number: int, through: str) -> int | None:
        """The end of a turn, including its end-of-turn token."""
        rests = self._following(chat, text, number, through)
        if rests is None:
            return None
        rest, ending = rests
        place = len(text) - len(rest)
        closed = ending.rstrip()
        if closed and rest.startswith(closed):
            return place + len(closed)
        # The last turn may have a different end-of-turn token from an earlier one, or none.
        specials = self._special_tokens()
        shared = closed.removesuffix(next((token for token in specials if closed.endswith(token)), ""))
        if not rest.startswith(shared):
            return None
        if any(shared.rstrip().endswith(token) for token in specials):  # the last turn is closed, and the chat, too
            return place + len(shared)
        mark = next((token for token in specials if rest.startswith(token, len(shared))), "")
        return place + len(shared) + len(mark)

    def _following(
        self, chat: Chat, text: str, number: int, beginning: str, prompt_for: int | None = None
    ) -> tuple[str, str] | None:
        """What follows a position in a message, in the text of the whole chat and in that of its first messages.

        A mark is inserted into the message and both texts are rendered again: the position is valid if nothing but the
        mark is added to them.

        Args:
            chat: the chat.
            text: the text of the whole chat.
            number: the index of the message.
            beginning: the text of the messages up to and including it, or of those before ``prompt_for``.
            prompt_for: the index of the turn with whose generation prompt the beginning ends.

        Returns:
            The rest of the text and the rest of the beginning; None if no position is valid.
        """
        mark = new_mark(text + beginning)
        count = number + 1 if prompt_for is None else prompt_for
        message = chat.messages[number]
        keys = sorted((key for key in message if key != "role"), key=lambda key: key != "content")
        for marked in marked_copies({key: message[key] for key in keys}, mark):
            messages = [*chat.messages[:number], {"role": message["role"], **marked}, *chat.messages[number + 1 :]]
            rest = self._after(mark, text, messages, chat.variables)
            if rest is None:
                continue
            short = self._after(mark, beginning, messages[:count], chat.variables, prompt=prompt_for is not None)
            if short is not None:
                return rest, short
        return None

    def _after(
        self, mark: str, text: str, messages: Sequence[Message], variables: Mapping[str, Any], *, prompt: bool = False
    ) -> str | None:
        """What follows a mark in the text of messages; None if the mark is not the only difference from ``text``."""
        try:
            before, found, after = self._text(messages, variables, prompt=prompt).partition(mark)
        except Exception:  # a template that refuses the marked value
            return None
        return after if found and before + after == text else None

    def _special_tokens(self) -> list[str]:
        """The special tokens, the longest first."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        tokens = {token.content for token in added if token.special} | {getattr(self._tokenizer, "eos_token", None)}
        return sorted((token for token in tokens if token), key=len, reverse=True)

    # Parts that the template does not print

    def _hidden(self, chat: Chat, text: str, places: Mapping[int, Extent]) -> frozenset[Part]:
        """The parts of a chat that do not affect its text."""
        parts = _parts(chat)
        roles = tuple(message["role"] for message in chat.messages)
        shape = (
            roles,
            tuple((part, _shape(value)) for part, value in parts.items()),
            repr(sorted(chat.template.items())),
        )
        known = self._left_out.get(shape)
        if known is None:
            if len(self._left_out) == _MOST_SHAPES:
                self._left_out.clear()
            known = frozenset(self._search(chat, text, self._doubtful(chat, text, parts, places)))
            self._left_out[shape] = known
            return known
        doubtful = {  # a text that occurs although the cache says that it is not printed, or the reverse
            part
            for part, value in parts.items()
            if isinstance(value, str) and len(value.strip()) >= _SURE and (value.strip() in text) is (part in known)
        }
        return known - doubtful | {part for part in doubtful if self._is_hidden(chat, text, part)}

    def _doubtful(self, chat: Chat, text: str, parts: Iterable[Part], places: Mapping[int, Extent]) -> list[Part]:
        """The parts that may not be printed: those of a short chat, and those of a long one without a mark in it."""
        left = [part for part in parts if part[1] != "content" or part[0] not in places]
        if len(chat.messages) < _LONG:
            return left
        keys: dict[str, set[int]] = {}
        for number, key in left:
            if number >= 0 and not _is_blank_text(chat.messages[number][key]):
                keys.setdefault(key, set()).add(number)
        shown = printed(chat.messages, keys, text, lambda messages: self._text(messages, chat.variables))
        return [part for part in left if part not in shown]

    def _search(self, chat: Chat, text: str, parts: Sequence[Part]) -> Iterator[Part]:
        """The parts that are not printed, searched in halves if there are many."""
        if len(chat.messages) < _LONG or len(parts) == 1:
            yield from (part for part in parts if self._is_hidden(chat, text, part))
        elif parts and self._is_hidden(chat, text, *parts):
            yield from parts
        elif parts:
            middle = len(parts) // 2
            yield from self._search(chat, text, parts[:middle])
            yield from self._search(chat, text, parts[middle:])

    def _is_hidden(self, chat: Chat, text: str, *parts: Part) -> bool:
        """Whether the text of a chat is the same without some of its parts."""
        messages = list(chat.messages)
        for number, key in parts:
            if (number, key) != _TOOLS:
                rest = {name: value for name, value in messages[number].items() if name != key}
                messages[number] = {**rest, "content": ""} if key == "content" else rest
        try:
            return self._text(messages, chat.template if _TOOLS in parts else chat.variables) == text
        except Exception:  # a template that requires a part
            return False

    # Content of several parts

    def _flat(self, message: Message) -> Message:
        """A message with its content parts joined to one text, unless the template supports parts."""
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
            text = self._text([{"role": "user", "content": [{"type": "text", "text": mark}]}], {})
        except Exception:  # a template that does not support lists
            return False
        return mark in text and "'text'" not in text and '"text"' not in text


def _speaks(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _says_nothing(message: Message, number: int, hidden: frozenset[Part]) -> bool:
    """Whether a turn has nothing to train on but its end-of-turn token."""
    printed = [key for key, value in message.items() if key != "role" and not is_nothing(value)]
    return all((number, key) in hidden or (key == "content" and _is_blank(message[key])) for key in printed)


def _is_blank_text(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _is_blank(content: Any) -> bool:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return not any(text.strip() for text in texts)


def _agreement(first: str, other: str) -> int:
    """The length of the common prefix of two texts, in characters."""
    pairs = enumerate(zip(first, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(first), len(other)))


def _parts(chat: Chat) -> dict[Part, Any]:
    """The parts of a chat other than roles, by position."""
    parts: dict[Part, Any] = {
        (number, key): value
        for number, message in enumerate(chat.messages)
        for key, value in message.items()
        if key != "role" and not is_nothing(value)
    }
    return parts if chat.tools is None else {**parts, _TOOLS: chat.tools}


def _shape(value: Any, depth: int = _DEPTH) -> Any:
    """The structure of a value: its keys and types, without its texts and numbers."""
    if isinstance(value, Mapping) and depth:
        return tuple(sorted((str(key), _shape(item, depth - 1)) for key, item in value.items()))
    if isinstance(value, (list, tuple)) and depth:
        return tuple(_shape(item, depth - 1) for item in value)
    return type(value).__name__


def _name(chat: Chat, part: Part) -> str:
    number, key = part
    return f"'content' of {chat.messages[number]['role']} messages" if key == "content" else repr(key)
