"""Comparing the answers of adapters, and of combinations of them, to the same prompts."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import AdapterError, ConfigError, shown
from nbpeft.session.checks import listed, names_of, prompts_of, weights_of
from nbpeft.session.commands.combining import combination_settings, free_name, make_combination, seeded
from nbpeft.session.prompts import NO_TEMPLATE, prompt_batch
from nbpeft.session.results.comparing import BASE, Answer, Column, CompareResult, Status, blend_title
from nbpeft.session.sampling import Sampling
from nbpeft.training.watching.generation import (
    GenerationRequest,
    PromptBatch,
    answered,
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
    blend: Sequence[Mapping[str, float]] = (),
    include_base: bool = True,
    max_new_tokens: int = 64,
    tokenizer: Any = None,
    chat: bool | None = None,
    system: str | None = None,
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
        prompts: one or several; texts, or conversations in the format of chat templates.
        adapters: names of the adapters; None for all.
        blend: adapter name -> weight, for exact weighted sums that are compared too, each in its own generation.
        include_base: whether to include the base model.
        max_new_tokens: maximal number of new tokens per answer.
        tokenizer: the model's tokenizer; the last one given if None.
        chat: apply the tokenizer's chat template to texts; None decides for each adapter by how it was trained, or else
            by whether the tokenizer has one.
        system: the system prompt, empty for none; None for that of the rows that each adapter was trained on. The base
            model gets what the adapters have in common.
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
    named = None if adapters is None else tuple(dict.fromkeys(names_of(adapters)))
    blends = [weights_of(weights) for weights in listed(blend, "blend must be a list of weights, each by adapter")]
    if after is not None and not isinstance(after, CompareResult):
        raise ConfigError(f"after must be the result of a comparison, not {shown(after)}", field="after")
    tracked = ctx.find_adapted(model, command="compare", adapters=[*(named or ()), *itertools.chain(*blends)])
    manager = tracked.manager
    manager.refuse_merged("comparing")
    names = manager.names if named is None else named
    manager.require_available(*names, *(name for weights in blends for name in weights))
    columns, prompts = _columns(names, blends, include_base), prompts_of(prompts)
    if after is not None:
        columns = _continuing(columns, after, prompts, chat)

    def batch_of(column: Column) -> PromptBatch:
        answering = tuple(name for name, _ in column.weights) or names
        return prompt_batch(ctx, tracked, prompts, tokenizer, chat, system, answering, column.conversation)

    batches = [batch_of(column) for column in columns]
    answering = _Answering(tracked, batches, columns, request, on_text, sampling.settings)
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
    r: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    include_base: bool = True,
    max_new_tokens: int = 64,
    tokenizer: Any = None,
    chat: bool | None = None,
    system: str | None = None,
    on_text: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
    model: ModelLike = None,
) -> CompareResult:
    """Generate answers with a combination that is added temporarily.

    Args:
        weights: adapter name -> weight.
        prompts: one or several.
        type: how to combine; see ``combine``.
        r: see ``combine``.
        density: see ``combine``.
        seed: see ``combine``.
        include_base: whether to include the base model.
        max_new_tokens: maximal number of new tokens per answer.
        tokenizer: see ``compare``.
        chat: see ``compare``.
        system: see ``compare``; None for that which the adapters have in common.
        on_text: called with the answers so far, several times per second.
        should_stop: called after each token; True ends the generation early.
        model: an adapted model.
    """
    settings = combination_settings(type, r=r, density=density)
    weights = weights_of(weights)
    tracked = ctx.models.get(model, command="try_combination", adapters=weights)
    tracked.manager.active_state.refuse_changes()
    batch = prompt_batch(ctx, tracked, prompts_of(prompts), tokenizer, chat, system, weights)
    with ctx.command(f"trying {type}", slow=True) as notes, evaluating(tracked.model):
        name = free_name(TRIAL, tracked.manager.names)
        try:
            with seeded(seed):
                make_combination(ctx, tracked, weights, name, settings)
            pairs = tuple((key, float(weight)) for key, weight in weights.items())
            columns = [*_columns((), (), True)] if include_base else []
            columns.append(Column(f"{type}: {blend_title(pairs)}", pairs, row=name))
            request = GenerationRequest(None, max_new_tokens, {}, None, should_stop)
            result = _Answering(tracked, [batch] * len(columns), columns, request, on_text).run()
        finally:
            with DeferredInterrupts(to_the_end=True):
                if name in tracked.manager.configs:
                    tracked.manager.remove(name)
        return dataclasses.replace(result, notes=tuple(notes))


class _Answering:
    """Fills columns with answers, one generation after the other, until one is stopped."""

    def __init__(
        self,
        tracked: TrackedModel,
        batches: Sequence[PromptBatch],
        columns: list[Column],
        request: GenerationRequest,
        on_text: Report | None,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        self._tracked, self._batches, self._request = tracked, batches, request
        self._on_text, self._settings = on_text, settings or {}
        self._columns = [
            dataclasses.replace(
                column, answers=(Answer(),) * len(batch.prompts), form=batch.form, system=batch.system, chat=batch.chat
            )
            for column, batch in zip(columns, batches, strict=True)
        ]
        self._prompts = tuple(batches[0].prompts)
        self._started = time.perf_counter()

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

        batch = PromptBatch.joined([self._batches[place] for place in places])
        rows = [self._columns[place].row for place in places for _ in self._batches[place].prompts]
        request = dataclasses.replace(self._request, rows=rows if first.row else None, report=self._on_text and report)
        with nullcontext() if first.row else blended(self._tracked.manager, dict(first.weights)):
            answers, complete = generate_batch(model, batch, request)
        self._fill(places, answers)
        return complete

    def _fill(self, places: list[int], answers: list[Answer]) -> None:
        rest = iter(answers)
        for place in places:
            batch, mine = self._batches[place], tuple(itertools.islice(rest, len(self._batches[place].prompts)))
            said = answered(batch.conversations[0], mine[0].text) if len(batch.conversations) == 1 else ()
            self._columns[place] = dataclasses.replace(self._columns[place], answers=mine, conversation=said)

    def _report(self, status: Status) -> None:
        if self._on_text is not None:
            self._on_text(self._result(status))

    def _result(self, status: Status) -> CompareResult:
        seconds, passes = time.perf_counter() - self._started, len(self._passes())
        columns, settings = tuple(self._columns), self._settings
        return CompareResult(self._tracked.name, self._prompts, columns, seconds, passes, status, settings=settings)


def _continuing(
    columns: list[Column], after: CompareResult, prompts: Sequence[Prompt], chat: bool | None
) -> list[Column]:
    """Return the columns, each with its own conversation so far."""
    if len(prompts) != 1 or len(after.prompts) != 1:
        raise AdapterError("a conversation continues with one prompt at a time")
    if chat is False or not after.chat:
        raise AdapterError(NO_TEMPLATE)
    earlier = {column.title: column for column in after.columns}
    found = []
    for column in columns:
        before = earlier.get(column.title)
        if before is not None:
            turns = (*before.turns, (after.prompts[0], before.answers[0].text))
            column = dataclasses.replace(column, turns=turns, conversation=before.conversation)
        found.append(column)
    return found


def _columns(names: Sequence[str], blends: Sequence[Mapping[str, float]], include_base: bool) -> list[Column]:
    """Return the columns, without answers."""
    columns = [Column(BASE if BASE not in names else f"({BASE})", row=BASE_ROW)] if include_base else []
    columns += [Column(name, ((name, 1.0),), row=name) for name in names]
    for weights in blends:
        pairs = tuple((name, float(weight)) for name, weight in weights.items())
        columns.append(Column(blend_title(pairs), pairs))
    if not columns:
        raise AdapterError("nothing to compare: no adapters, no blends, and no base model")
    return columns
