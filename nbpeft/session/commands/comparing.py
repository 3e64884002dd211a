"""Comparing the answers of adapters, and of combinations of them, to the same prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.errors import AdapterError
from nbpeft.session.checks import names_of, prompts_of, weights_of
from nbpeft.session.commands.combining import combination_settings, free_name, make_combination, seeded
from nbpeft.session.prompts import prompt_batch
from nbpeft.session.results.comparing import BASE, Answer, Column, CompareResult, Status, blend_title
from nbpeft.session.sampling import Sampling
from nbpeft.training.watching.generation import (
    GenerationRequest,
    PromptBatch,
    conversation,
    evaluating,
    generate_batch,
    waits,
)

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training.watching.generation import Prompt

    Report = Callable[[CompareResult], object]

BASE_ROW = "__base__"
TRIAL = "trial"
"""Name of the temporary adapter of ``try_combination``; a number is appended if it is taken."""


def compare(
    ctx: SessionContext,
    /,
    prompts: str | Sequence[Prompt],
    *,
    adapters: Sequence[str] | None = None,
    blends: Sequence[Mapping[str, float]] = (),
    include_base: bool = True,
    max_new_tokens: int = 64,
    tokenizer: Any = None,
    chat: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    after: CompareResult | None = None,
    on_text: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
    model: ModelLike = None,
    **generation: Any,
) -> CompareResult:
    """Generate the answers of the base model and of adapters to the same prompts in one batched generation.

    No adapter is activated and no memory is allocated for weights. After an interruption the result has the status
    ``stopped`` and the answers so far.

    Args:
        ctx: context of the session.
        prompts: one or several; texts, or conversations in the format of chat templates.
        adapters: names of the adapters; None for all.
        blends: adapter name -> weight, for exact weighted sums that are compared too, each in its own generation.
        include_base: whether to include the base model.
        max_new_tokens: maximal number of new tokens per answer.
        tokenizer: the model's tokenizer; the last one given if None.
        chat: apply the tokenizer's chat template to texts; None decides by how the adapters were last trained in
            this session, or else by whether the tokenizer has one.
        temperature: sampling temperature; 0 is greedy.
        top_p: sample from the most likely tokens whose probabilities sum up to this value.
        seed: seed of the random numbers, which are separate from those of the notebook.
        after: continue the conversations of this result, each column with its own.
        on_text: called with the answers so far, several times per second.
        should_stop: called after each token; True ends the generation early.
        model: an adapted model.
        **generation: further arguments of ``generate``, e.g. ``num_beams=4``; greedy by default.

    Raises:
        UnknownAdapterError: there is no such adapter.
        ConfigError: a setting is invalid.
        AdapterError: adapters are merged, there is no tokenizer, nothing to compare, or no chat template to continue
            a conversation with.
    """
    sampling = Sampling(temperature, top_p, seed)
    request = GenerationRequest(None, max_new_tokens, sampling.options | generation, None, should_stop)
    tracked = ctx.find_adapted(model, command="compare")
    manager = tracked.manager
    manager.refuse_merged("comparing")
    names = manager.names if adapters is None else tuple(dict.fromkeys(names_of(adapters)))
    blends = [weights_of(weights) for weights in blends]
    manager.require_available(*names, *(name for weights in blends for name in weights))
    columns, prompts = _columns(names, blends, include_base), prompts_of(prompts)
    batch = prompt_batch(ctx, tracked, prompts, tokenizer, chat)
    answering = _Answering(tracked, batch, columns, request, on_text, sampling.settings)
    if after is not None:
        answering.go_on(after, prompts)
    with ctx.command("comparing", slow=True) as notes:
        answering.wait()
        with evaluating(tracked.model), sampling.random_numbers():
            result = answering.run()
        return dataclasses.replace(result, notes=(*notes, *sampling.notes))


def try_combination(
    ctx: SessionContext,
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
    on_text: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
    model: ModelLike = None,
) -> CompareResult:
    """Generate answers with a combination that is added temporarily.

    Args:
        ctx: context of the session.
        weights: adapter name -> weight.
        prompts: one or several.
        type: how to combine; see ``combine``.
        rank: see ``combine``.
        density: see ``combine``.
        seed: see ``combine``.
        include_base: whether to include the base model.
        max_new_tokens: maximal number of new tokens per answer.
        tokenizer: see ``compare``.
        chat: see ``compare``.
        on_text: called with the answers so far, several times per second.
        should_stop: called after each token; True ends the generation early.
        model: an adapted model.
    """
    settings = combination_settings(type, rank=rank, density=density)
    weights = weights_of(weights)
    tracked = ctx.models.get(model, command="try_combination")
    tracked.manager.active_state.refuse_changes()
    batch = prompt_batch(ctx, tracked, prompts_of(prompts), tokenizer, chat)
    with ctx.command(f"trying {type}", slow=True) as notes, evaluating(tracked.model):
        name = free_name(TRIAL, tracked.manager.names)
        try:
            with seeded(seed):
                make_combination(ctx, tracked, weights, name, settings)
            pairs = tuple((key, float(weight)) for key, weight in weights.items())
            columns = [*_columns((), (), True)] if include_base else []
            columns.append(Column(f"{type}: {blend_title(pairs)}", pairs, row=name))
            request = GenerationRequest(None, max_new_tokens, {}, None, should_stop)
            result = _Answering(tracked, batch, columns, request, on_text).run()
        finally:
            with HeldInterrupts(to_the_end=True):
                if name in tracked.manager.configs:
                    tracked.manager.remove(name)
        return dataclasses.replace(result, notes=tuple(notes))


class _Answering:
    """Fills columns with answers, one generation after the other, until one is stopped.

    Args:
        tracked: the model.
        batch: the prompts.
        columns: the columns without answers.
        request: the common settings of all generations.
        on_text: called with the answers so far.
        settings: sampling settings for the result.
    """

    def __init__(
        self,
        tracked: TrackedModel,
        batch: PromptBatch,
        columns: list[Column],
        request: GenerationRequest,
        on_text: Report | None,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        self._tracked, self._batch, self._request = tracked, batch, request
        self._on_text, self._settings = on_text, settings or {}
        self._columns = [dataclasses.replace(column, answers=(Answer(),) * len(batch.prompts)) for column in columns]
        self._prompt: Prompt | None = None
        self._started = time.perf_counter()

    def go_on(self, after: CompareResult, prompts: Sequence[Prompt]) -> None:
        """Continues each column's own conversation.

        Args:
            after: result with the conversations so far.
            prompts: the next prompt, as a list of one.

        Raises:
            AdapterError: there is not exactly one prompt, or no chat template.
        """
        if len(prompts) != 1 or len(after.prompts) != 1:
            raise AdapterError("a conversation continues with one prompt at a time")
        if not (self._batch.chat and after.chat):
            raise AdapterError("a conversation needs the chat template, which is not applied here: start a new one")
        self._prompt, columns = prompts[0], {column.title: column for column in after.columns}
        for place, column in enumerate(self._columns):
            before = columns.get(column.title)
            if before is not None:
                turns = (*before.turns, (after.prompts[0], before.answers[0].text))
                self._columns[place] = dataclasses.replace(column, turns=turns)

    def wait(self) -> None:
        """Reports that the answers wait, if a training in the background is using the model."""
        if waits(self._tracked.model):
            self._report("waiting")
        self._started = time.perf_counter()

    def run(self) -> CompareResult:
        """Generates all answers."""
        self._started = time.perf_counter()
        self._report("running")
        for places in self._passes():
            if not self._answer(places):
                return self._result("stopped")
        return self._result("finished")

    def _passes(self) -> list[list[int]]:
        """Returns the columns per generation, by index: the base and all adapters together, each blend alone."""
        together = [place for place, column in enumerate(self._columns) if column.row]
        alone = [[place] for place, column in enumerate(self._columns) if not column.row]
        return [together, *alone] if together else alone

    def _answer(self, places: list[int]) -> bool:
        from nbpeft.model.handle.serving import blended

        first, model = self._columns[places[0]], self._tracked.model

        def report(answers: list[Answer]) -> None:
            self._fill(places, answers)
            self._report("running")

        rows = [self._columns[place].row for place in places] if first.row else None
        batch, paired = self._batch, self._prompt is not None
        if self._prompt is not None:
            prompts = [conversation(self._columns[place].turns, self._prompt) for place in places]
            batch = PromptBatch.of(prompts, batch.tokenizer, self._tracked.manager.model)
        request = dataclasses.replace(self._request, rows=rows, paired=paired, report=self._on_text and report)
        with nullcontext() if first.row else blended(self._tracked.manager, dict(first.weights)):
            answers, complete = generate_batch(model, batch, request)
        self._fill(places, answers)
        return complete

    def _fill(self, places: list[int], answers: list[Answer]) -> None:
        count = len(self._batch.prompts)
        for number, place in enumerate(places):
            mine = tuple(answers[number * count : (number + 1) * count])
            self._columns[place] = dataclasses.replace(self._columns[place], answers=mine)

    def _report(self, status: Status) -> None:
        if self._on_text is not None:
            self._on_text(self._result(status))

    def _result(self, status: Status) -> CompareResult:
        return CompareResult(
            self._tracked.name,
            self._batch.prompts,
            tuple(self._columns),
            time.perf_counter() - self._started,
            len(self._passes()),
            status,
            self._batch.form,
            chat=self._batch.chat,
            settings=self._settings,
        )


def _columns(names: Sequence[str], blends: Sequence[Mapping[str, float]], include_base: bool) -> list[Column]:
    """Return the columns, without answers.

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
