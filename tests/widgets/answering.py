"""A session whose adapters answer from a book, word by word, without a model. Needs no torch."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from nbpeft.errors import AdapterError, AdapterExistsError
from nbpeft.session.results.comparing import BASE, Answer, Column, CompareResult, blend_title
from tests.waiting import PATIENCE
from tests.widgets.fakes import FakeSession, adapter

PROMPT = "Order: Ana from Lima needs 12 chairs."
ANSWERS = {
    BASE: "I am happy to help you with your order of chairs. Could you tell me",
    "orders": '{"name": "Ana", "city": "Lima", "item": "chairs", "count": 12}',
    "pirate": "Arr, Ana of Lima be wantin' 12 chairs for her ship!",
    "sql": "SELECT chairs FROM orders WHERE name = 'Ana' AND city = 'Lima';",
}
BLENDED = '{"name": "Ana", "city": "Lima", "item": "chairs", "count": "12, arr"}'


class AnsweringSession(FakeSession):
    """Knows ``compare``, ``try_combination`` and ``combine``.

    Args:
        pause: Seconds a word takes.
        conversing: Whether the chat template is applied.
    """

    def __init__(self, pause: float = 0.0, *, conversing: bool = False) -> None:
        super().__init__()
        self.pause, self.conversing = pause, conversing
        self.sampling: dict[str, float | None] = {}
        self.threads: list[str] = []
        self.chats: list[bool | None] = []
        self.systems: list[str | None] = []
        self.go = threading.Event()
        self.go.set()

    def compare(
        self,
        prompt: str,
        *,
        model: str,
        adapters: Sequence[str],
        include_base: bool = True,
        blend: Sequence[Mapping[str, float]] = (),
        max_new_tokens: int,
        chat: bool | None = None,
        system: str | None = None,
        tokenizer: Any,
        on_text: Callable[[CompareResult], object],
        should_stop: Callable[[], bool],
        after: CompareResult | None = None,
        **sampling: float | None,
    ) -> CompareResult:
        self.chats.append(chat)
        self.systems.append(system)
        self.sampling = sampling
        self._take("compare", prompt, tuple(adapters), include_base, *(dict(weights) for weights in blend))
        texts = {BASE: ANSWERS[BASE]} if include_base else {}
        texts |= {name: ANSWERS.get(name, f"I am {name}") for name in adapters}
        texts |= {blend_title(tuple(weights.items())): BLENDED for weights in blend}
        return self._stream(prompt, texts, max_new_tokens, on_text, should_stop, after, conversing=self.conversing)

    def try_combination(
        self,
        weights: Mapping[str, float],
        prompt: str,
        *,
        type: str,
        density: float,
        seed: int,
        include_base: bool,
        model: str,
        max_new_tokens: int,
        chat: bool | None = None,
        system: str | None = None,
        tokenizer: Any,
        on_text: Callable[[CompareResult], object],
        should_stop: Callable[[], bool],
    ) -> CompareResult:
        self.chats.append(chat)
        self.systems.append(system)
        self._take("try", prompt, dict(weights), type, density, include_base)
        texts = {BASE: ANSWERS[BASE]} if include_base else {}
        texts[f"{type}: {blend_title(tuple(weights.items()))}"] = BLENDED
        return self._stream(prompt, texts, max_new_tokens, on_text, should_stop)

    def combine(
        self, weights: Mapping[str, float], *, name: str, type: str, seed: int, model: str, **options: Any
    ) -> str:
        self._take("combine", dict(weights), name, type, options)
        adapters = self.models[model].adapters
        if name in [item.name for item in adapters]:
            raise AdapterExistsError(f"{model} has an adapter {name!r} already")
        self.change(model, adapters=(*adapters, adapter(name, trainable=False)))
        return f"made {name!r}"

    def _stream(
        self,
        prompt: str,
        texts: Mapping[str, str],
        limit: int,
        on_text: Callable[[CompareResult], object],
        should_stop: Callable[[], bool],
        after: CompareResult | None = None,
        *,
        conversing: bool = False,
    ) -> CompareResult:
        self.threads.append(threading.current_thread().name)
        if not prompt:
            raise AdapterError("a prompt is empty")
        started = time.perf_counter()
        longest = min(limit, max(len(text.split()) for text in texts.values()))
        result = CompareResult("model", (prompt,), (), 0.0, 1, "running")
        said = {column.title: column for column in after.columns} if after is not None else {}
        turns = {
            title: (*column.turns, (after.prompts[0], column.answers[0].text))
            for title, column in said.items()
            if after is not None
        }
        for count in range(longest + 1):
            self.go.wait(PATIENCE)
            columns = tuple(
                Column(title, (), (_answer(text, count, limit),), turns=turns.get(title, ()), chat=conversing)
                for title, text in texts.items()
            )
            result = dataclasses.replace(result, columns=columns, seconds=time.perf_counter() - started)
            if should_stop():
                return dataclasses.replace(result, status="stopped")
            on_text(result)
            time.sleep(self.pause)
        return dataclasses.replace(result, status="finished")


def _answer(text: str, count: int, limit: int) -> Answer:
    words = text.split(" ")
    return Answer(" ".join(words[:count]), min(count, len(words)), cut=count >= limit or text == ANSWERS[BASE])


TOKENIZER = SimpleNamespace(decode=str)
