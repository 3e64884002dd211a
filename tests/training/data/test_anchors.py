"""Long chats are read in linear time, with the parts that rendering each turn finds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from nbpeft.errors import TrainingError
from nbpeft.training.data import chats
from nbpeft.training.data.forms import Chat
from tests.training.data.test_chats import FORGETFUL, ONLY_LAST, PRINTING, THINKING, tokenizer, use

__all__ = ["tokenizer", "use"]

OPENS_THINKING = THINKING.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
TEMPLATES = {"printing": PRINTING, "forgetful": FORGETFUL, "last": ONLY_LAST, "thinking": THINKING}
TEMPLATES |= {"opening": OPENS_THINKING}
OF_PARTS = (
    "{% for message in messages %}<|{{ message.role }}|>\n{% for part in message.content %}{{ part.text }}{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ANSWERS = ("yes", " padded ", "line\n", "<b>", "<think>\nq\n</think>\n\nyes", "</think>a", "end", "assistant", "")


def asks(number: int) -> dict[str, Any]:
    call = {"type": "function", "id": "a", "function": {"name": "look", "arguments": {"at": f"mat {number}"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def long_chat(turns: int, *, calls: bool) -> Chat:
    messages: list[dict[str, Any]] = []
    for number in range(turns):
        messages.append({"role": "user", "content": f"What is {number}?"})
        if calls:
            messages += [asks(number), {"role": "tool", "name": "look", "content": f"mat {number}"}]
        messages.append({"role": "assistant", "content": f"It is {number}."})
    return Chat(tuple(messages), (1.0,) * len(messages))


def random_chat(rng: random.Random) -> Chat:
    messages: list[dict[str, Any]] = []
    for number in range(rng.randrange(4, 8)):
        messages.append({"role": "user", "content": rng.choice([*ANSWERS[:-1], "What is it?"])})
        if rng.random() < 0.4:
            messages += [asks(number), {"role": "tool", "name": "look", "content": rng.choice(ANSWERS[:4])}]
        reply = {"role": "assistant", "content": rng.choice(ANSWERS) if rng.random() < 0.4 else f"It is {number}."}
        messages.append(reply if rng.random() < 0.7 else {**reply, "reasoning_content": "I think so."})
    return Chat(tuple(messages), (1.0,) * len(messages))


def rendered(tokenizer: Any, chat: Chat) -> chats.RenderedChat | str:
    try:
        return chats.ChatRenderer(tokenizer).render(chat)
    except TrainingError as error:
        return str(error)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each text that a template renders."""
    found: list[int] = []
    render = chats.ChatRenderer._text

    def counted(*args: Any, **options: Any) -> str:
        text = render(*args, **options)
        found.append(len(text))
        return text

    monkeypatch.setattr(chats.ChatRenderer, "_text", counted)
    return found


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_rendered_text_grows_with_the_chat(
    tokenizer: Any, use: Any, sizes: list[int], name: str, calls: bool
) -> None:
    use(TEMPLATES[name])
    counts, lengths = [], []
    for turns in (20, 80):
        sizes.clear()
        found = chats.ChatRenderer(tokenizer).render(long_chat(turns, calls=calls))
        assert len(found.spans) == turns * (2 if calls else 1) or found.missing
        counts.append(len(sizes))
        lengths.append(sum(sizes) / len(found.text))
    assert counts[0] == counts[1] <= 32
    assert lengths[1] <= lengths[0] * 1.01 + 1


def test_a_long_chat_of_parts_is_read_in_linear_time(tokenizer: Any, use: Any, sizes: list[int]) -> None:
    """For templates of models that see, which take contents as lists."""
    use(OF_PARTS)
    counts = []
    for turns in (20, 80):
        sizes.clear()
        plain = long_chat(turns, calls=False)
        messages = tuple({**one, "content": [{"type": "text", "text": one["content"]}]} for one in plain.messages)
        found = chats.ChatRenderer(tokenizer).render(replace(plain, messages=messages))
        learned = [found.text[span.first : span.last] for span in found.spans]
        assert learned == [f"It is {number}.</s>\n" for number in range(turns)]
        counts.append(len(sizes))
    assert counts[0] == counts[1] <= 32


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_chats_are_read_as_short_ones(
    tokenizer: Any, use: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also what the surroundings of a turn do not tell: reasoning, blanks, and texts like the marks of a template."""
    use(TEMPLATES[name])
    rng, turns = random.Random(0), 0
    for _ in range(20):
        chat = random_chat(rng)
        together = rendered(tokenizer, chat)
        with monkeypatch.context() as patch:
            patch.setattr(chats, "_LONG", 1_000)
            assert together == rendered(tokenizer, chat)
        turns += 0 if isinstance(together, str) else len(together.spans)
    for calls in (False, True):
        together = rendered(tokenizer, long_chat(6, calls=calls))
        with monkeypatch.context() as patch:
            patch.setattr(chats, "_LONG", 1_000)
            assert together == rendered(tokenizer, long_chat(6, calls=calls))
        turns += 0 if isinstance(together, str) else len(together.spans)
    assert turns >= 6
