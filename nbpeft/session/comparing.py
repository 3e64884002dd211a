"""The commands that let adapters answer prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.session.answering import Asked, Batch, Prompt, answer, evaluating
from nbpeft.session.book import Entry
from nbpeft.session.checks import names_of, prompts_of, weights_of
from nbpeft.session.combining import CombiningCommands, free_name, recipe_of, seeded
from nbpeft.session.compared import BASE, Answer, Column, CompareResult, blend_title

if TYPE_CHECKING:
    from torch import nn

    ModelLike = nn.Module | str | None

BASE_ROW = "__base__"
TRIAL = "trial"
"""What the passing adapter of ``try_combination`` is called, or a name like it where that is taken."""


class ComparingCommands(CombiningCommands):
    """Answers of several adapters side by side."""

    def compare(
        self,
        prompts: str | Sequence[Prompt],
        *,
        adapters: Sequence[str] | None = None,
        blends: Sequence[Mapping[str, float]] = (),
        include_base: bool = True,
        max_new_tokens: int = 64,
        tokenizer: Any = None,
        chat: bool | None = None,
        on_text: Callable[[CompareResult], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
        model: ModelLike = None,
        **generation: Any,
    ) -> CompareResult:
        """Lets the base model and adapters answer the same prompts in one batched generation.

        Nothing becomes active or allocated. Interrupting it ends it gracefully: the result says
        ``stopped`` and holds the answers so far.

        Args:
            prompts: one or several; texts, or conversations in the form of chat templates.
            adapters: names; all if left out.
            blends: adapter -> weight of exact weighted sums that answer too, each in a generation
                of its own.
            include_base: whether the base model answers too.
            max_new_tokens: longest answer.
            tokenizer: of the model; the one given before if left out.
            chat: put texts into the tokenizer's chat template; None: as the adapters were trained
                last in this session, or else where it has one.
            on_text: called with the answers so far, some times a second.
            should_stop: asked at each token; True ends it early.
            model: an adapted model.
            **generation: further arguments of ``generate``, e.g. ``do_sample=True``; greedy by default.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: there is no tokenizer, or nothing to compare.
            MergeError: adapters are merged.
        """
        how = Asked(None, max_new_tokens, generation, None, should_stop)
        entry = self._entry_of(model)
        entry = entry if entry is not None else self._book.get(model)
        manager = entry.manager
        manager.refuse_merged("comparing")
        names = manager.names if adapters is None else tuple(dict.fromkeys(names_of(adapters)))
        blends = [weights_of(weights) for weights in blends]
        manager.require_reachable(*names, *(name for weights in blends for name in weights))
        columns = _columns(names, blends, include_base)
        asked = prompts_of(prompts)
        batch = self._batch(entry, asked, tokenizer, chat)
        with self._command("comparing", slow=True) as notes, evaluating(entry.model):
            return dataclasses.replace(_Comparison(entry, batch, columns, on_text).run(how), notes=tuple(notes))

    def try_combination(
        self,
        weights: Mapping[str, float],
        prompts: str | Sequence[Prompt],
        *,
        type: str = "exact",
        rank: int | None = None,
        density: float | None = None,
        seed: int | None = None,
        include_base: bool = True,
        max_new_tokens: int = 64,
        tokenizer: Any = None,
        chat: bool | None = None,
        on_text: Callable[[CompareResult], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
        model: ModelLike = None,
    ) -> CompareResult:
        """Answers prompts with a combination that is made for it and taken out again.

        Args:
            weights: adapter -> weight.
            prompts: one or several.
            type: how to combine; see ``combine``.
            rank: see ``combine``.
            density: see ``combine``.
            seed: see ``combine``.
            include_base: whether the base model answers too.
            max_new_tokens: longest answer.
            tokenizer: see ``compare``.
            chat: see ``compare``.
            on_text: called with the answers so far.
            should_stop: asked at each token.
            model: an adapted model.
        """
        recipe = recipe_of(type, rank=rank, density=density)
        weights = weights_of(weights)
        entry = self._book.get(model)
        manager = entry.manager
        asked = prompts_of(prompts)
        batch = self._batch(entry, asked, tokenizer, chat)
        with self._command(f"trying {type}", slow=True) as notes, evaluating(entry.model):
            name = free_name(TRIAL, manager.names)
            try:
                with seeded(seed):
                    self._make(entry, weights, name, recipe, False)
                pairs = tuple((key, float(weight)) for key, weight in weights.items())
                columns = [*_columns((), (), True)] if include_base else []
                columns.append(Column(f"{type}: {blend_title(pairs)}", pairs, row=name))
                how = Asked(None, max_new_tokens, {}, None, should_stop)
                result = _Comparison(entry, batch, columns, on_text).run(how)
            finally:
                with HeldInterrupts(to_the_end=True):
                    if name in manager.configs:
                        manager.remove(name)
            return dataclasses.replace(result, notes=tuple(notes))


class _Comparison:
    """Fills columns, generation by generation."""

    def __init__(
        self,
        entry: Entry,
        batch: Batch,
        columns: list[Column],
        on_text: Callable[[CompareResult], object] | None,
    ) -> None:
        self._entry, self._batch, self._on_text = entry, batch, on_text
        empty = (Answer(),) * len(batch.prompts)
        self._columns = [dataclasses.replace(column, answers=empty) for column in columns]
        self._started = time.perf_counter()

    def run(self, how: Asked) -> CompareResult:
        """Runs all generations, or those up to the one that is stopped."""
        together = [place for place, column in enumerate(self._columns) if column.row]
        passes = [[place] for place, column in enumerate(self._columns) if not column.row]
        if together:
            passes.insert(0, together)
        self._passes = len(passes)
        self._report()
        for places in passes:
            if not self._generate(places, how):
                return self._result("stopped")
        return self._result("finished")

    def _generate(self, places: list[int], how: Asked) -> bool:
        first = self._columns[places[0]]
        rows = [self._columns[place].row for place in places] if first.row else None

        def report(answers: list[Answer]) -> None:
            self._fill(places, answers)
            self._report()

        asked = dataclasses.replace(how, rows=rows, report=None if self._on_text is None else report)
        with nullcontext() if first.row else self._blended(dict(first.weights)):
            answers, complete = answer(self._entry.model, self._batch, asked)
        self._fill(places, answers)
        return complete

    def _blended(self, weights: Mapping[str, float]) -> AbstractContextManager[None]:
        from nbpeft.model.serving import blended

        return blended(self._entry.manager, weights)

    def _fill(self, places: list[int], answers: list[Answer]) -> None:
        count = len(self._batch.prompts)
        for number, place in enumerate(places):
            mine = tuple(answers[number * count : (number + 1) * count])
            self._columns[place] = dataclasses.replace(self._columns[place], answers=mine)

    def _report(self) -> None:
        if self._on_text is not None:
            self._on_text(self._result("running"))

    def _result(self, status: Any) -> CompareResult:
        seconds = time.perf_counter() - self._started
        batch = self._batch
        return CompareResult(
            self._entry.name, batch.prompts, tuple(self._columns), seconds, self._passes, status, batch.form
        )


def _columns(names: Sequence[str], blends: Sequence[Mapping[str, float]], include_base: bool) -> list[Column]:
    """The columns, still without answers.

    Raises:
        AdapterError: there are none.
    """
    columns = [Column(BASE if BASE not in names else f"({BASE})", row=BASE_ROW)] if include_base else []
    columns += [Column(name, ((name, 1.0),), row=name) for name in names]
    for weights in blends:
        pairs = tuple((name, float(weight)) for name, weight in weights.items())
        columns.append(Column(blend_title(pairs), pairs))
    if not columns:
        raise AdapterError("nothing to compare: no adapters, no blends, and no base model")
    return columns
