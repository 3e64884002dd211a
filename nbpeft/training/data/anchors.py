"""Finds the turns of a long chat in its text, where they begin and end as earlier turns of the same chat do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbpeft.training.data.options import has_reasoning, with_text
from nbpeft.training.data.row import is_nothing

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]
Extent = tuple[int, int]
"""First and last + 1 character of a text in the text of a chat."""

_LOOK = 8
"""The number of characters after its generation prompt that a turn without content shares with a known turn."""
_MOST_KNOWN = 32
"""The greatest number of surroundings of turns that are kept of a chat."""
_MOST_COPIES = 8
"""The greatest number of texts within a value that are tried."""


def new_mark(text: str) -> str:
    """A mark that does not occur in a text. Its control character is one that JSON does not escape."""
    return next(mark for number in itertools.count() if (mark := f"\x7f{number}\x7f") not in text)


def marked_copies(value: Any, mark: str) -> Iterator[Any]:
    """Copies of a value, each with a mark after one of its texts."""
    if isinstance(value, str):
        end = len(value.rstrip())  # templates may strip
        yield value[:end] + mark + value[end:]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from ({**value, key: marked} for marked in marked_copies(item, mark))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from ([*value[:place], marked, *value[place + 1 :]] for marked in marked_copies(item, mark))


def places_of_contents(messages: Sequence[Message], text: str, render: Render) -> dict[int, Extent]:
    """The places of the contents that are printed once, as they are written; of none if marks change the text.

    Args:
        messages: the messages of a chat.
        text: its text.
        render: renders messages.
    """
    mark = new_mark(text)
    contents = {number: said.strip() for number, message in enumerate(messages) if (said := _content(message)).strip()}
    changed = list(messages)
    for number, said in contents.items():
        whole = _content(messages[number])
        start = whole.index(said)
        marked = f"{mark}{2 * number}\x7f{said}{mark}{2 * number + 1}\x7f"
        changed[number] = with_text(messages[number], whole[:start] + marked + whole[start + len(said) :])
    found = _marks(changed, mark, text, render)
    return {
        number: (first, last)
        for number, said in contents.items()
        for first, last in itertools.product(found.get(2 * number, ()), found.get(2 * number + 1, ()))
        if len(found[2 * number]) == len(found[2 * number + 1]) == 1 and text[first:last] == said
    }


def printed(messages: Sequence[Message], keys: Mapping[str, set[int]], text: str, render: Render) -> set[Any]:
    """The parts of a chat of which a text appears in its text.

    Args:
        messages: the messages of the chat.
        keys: keys, each with the indices of the messages to look at.
        text: the text of the chat.
        render: renders messages.

    Returns:
        Indices of messages with a key.
    """
    mark, shown = new_mark(text), set()
    for key, numbers in keys.items():
        copies = {number: marked_copies(messages[number][key], f"{mark}{number}\x7f") for number in numbers}
        for _ in range(_MOST_COPIES):
            copied = {number: copy for number, made in copies.items() if (copy := next(made, None)) is not None}
            if not copied:
                break
            changed = [
                {**message, key: copied[number]} if number in copied else message
                for number, message in enumerate(messages)
            ]
            found = _marks(changed, mark, text, render)
            shown |= {(number, key) for number in found}
            copies = {number: made for number, made in copies.items() if number not in found}
    return shown


def _marks(messages: Sequence[Message], mark: str, text: str, render: Render) -> dict[int, list[int]]:
    """The positions in a text of the marks in its messages; none if not only the marks are added to the text."""
    try:
        pieces = re.split(re.escape(mark) + "([0-9]+)\x7f", render(messages))
    except Exception:  # a template that refuses a marked value
        return {}
    if "".join(pieces[::2]) != text:
        return {}
    found: dict[int, list[int]] = {}
    ends = itertools.accumulate(map(len, pieces[::2]))
    for number, place in zip(pieces[1::2], ends, strict=False):
        found.setdefault(int(number), []).append(place)
    return found


@dataclass(frozen=True)
class _Surroundings:
    """The texts around a turn that was found: from the content before it, and up to the content after it."""

    opening: str
    head: int
    closing: str
    tail: int


@dataclass
class KnownTurns:
    """Finds turns by the surroundings that they share with turns that were found by rendering.

    Attributes:
        messages: the messages of the chat.
        text: its text.
        places: the places of contents in the text.
    """

    messages: Sequence[Message]
    text: str
    places: Mapping[int, Extent]
    _known: dict[Any, list[_Surroundings]] = field(default_factory=dict)

    def find(self, number: int) -> Extent | None:
        """The span of a turn; None if it is not surrounded as a known one."""
        between = self._between(number)
        if between is None:
            return None
        start, end = between
        place = self.places.get(number)
        for known in self._known.get(self._kind(number), ()):
            opens = self.text.startswith(known.opening, start) and (
                place is None or start + len(known.opening) == place[0]
            )
            after = place[1] if self._is_plain(number) and place is not None else end - len(known.closing)
            if opens and after + len(known.closing) == end and self.text.endswith(known.closing, start, end):
                return start + known.head, end - known.tail
        return None

    def add(self, number: int, span: Extent) -> None:
        """Notes the surroundings of a turn that was found by rendering."""
        between = self._between(number)
        if between is None or not between[0] <= span[0] < span[1] <= between[1]:
            return
        (start, end), place = between, self.places.get(number)
        if place is not None and not span[0] <= place[0] <= place[1] <= span[1]:
            return
        opened = min(span[0] + _LOOK, span[1]) if place is None else place[0]
        closes = place[1] if self._is_plain(number) and place is not None else span[1]
        known = self._known.setdefault(self._kind(number), [])
        if len(known) < _MOST_KNOWN:
            known.append(_Surroundings(self.text[start:opened], span[0] - start, self.text[closes:end], end - span[1]))

    def _between(self, number: int) -> Extent | None:
        """The end of the content before a turn and the start of the content after it, or the end of the chat."""
        before, after = self.places.get(number - 1), self.places.get(number + 1)
        is_last = number + 1 == len(self.messages)
        if before is None or (after is None and not is_last) or has_reasoning(self.messages[number]):
            return None  # where reasoning begins depends on it
        return before[1], len(self.text) if after is None else after[0]

    def _is_plain(self, number: int) -> bool:
        return not any(
            key not in ("role", "content") and not is_nothing(value) for key, value in self.messages[number].items()
        )

    def _kind(self, number: int) -> Any:
        """The roles and keys of a message and its neighbours, with the white space around their contents."""
        return tuple(map(_form, self.messages[number - 1 : number + 2])), number in self.places


def _form(message: Message) -> Any:
    said = _content(message)
    spaces = (said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :])
    return message["role"], tuple(sorted(key for key, value in message.items() if not is_nothing(value))), spaces


def _content(message: Message) -> str:
    """The content of a message, if it is a text, or one part with a text; else the empty string."""
    content = message.get("content")
    if isinstance(content, list | tuple) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text")
    return content if isinstance(content, str) else ""
