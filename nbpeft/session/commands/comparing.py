"""Answers of adapters, and of combinations of them, to the same prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.session.checks import names_of, prompts_of, weights_of
from nbpeft.session.commands.combining import combination_settings, free_name, make_combination, seeded
from nbpeft.session.prompts import prompt_batch
from nbpeft.session.results.comparing import BASE, Answer, Column, CompareResult, blend_title
from nbpeft.training.generation import GenerationRequest, PromptBatch, evaluating, generate_batch

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training.generation import Prompt

    Report = Callable[[CompareResult], object]

BASE_ROW = "__base__"
TRIAL = "trial"
"""Name of the temporary adapter of ``try_combination``, or a name like it where that is taken."""


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
    on_text: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
    model: ModelLike = None,
    **generation: Any,
) -> CompareResult:
    """Let the base model and adapters answer the same prompts in one batched generation.

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
        AdapterError: adapters are merged, there is no tokenizer, or nothing to compare.
    """
    request = GenerationRequest(None, max_new_tokens, generation, None, should_stop)
    tracked = ctx.find_adapted(model, command="compare")
    manager = tracked.manager
    manager.refuse_merged("comparing")
    names = manager.names if adapters is None else tuple(dict.fromkeys(names_of(adapters)))
    blends = [weights_of(weights) for weights in blends]
    manager.require_available(*names, *(name for weights in blends for name in weights))
    columns = _columns(names, blends, include_base)
    batch = prompt_batch(ctx, tracked, prompts_of(prompts), tokenizer, chat)
    with ctx.command("comparing", slow=True) as notes, evaluating(tracked.model):
        result = _answered(tracked, batch, columns, on_text, request)
        return dataclasses.replace(result, notes=tuple(notes))


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
    """Answer prompts with a combination that is made for it and removed again.

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
    settings = combination_settings(type, rank=rank, density=density)
    weights = weights_of(weights)
    tracked = ctx.models.get(model, command="try_combination")
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
            result = _answered(tracked, batch, columns, on_text, request)
        finally:
            with HeldInterrupts(to_the_end=True):
                if name in tracked.manager.configs:
                    tracked.manager.remove(name)
        return dataclasses.replace(result, notes=tuple(notes))


def _answered(
    tracked: TrackedModel,
    batch: PromptBatch,
    columns: list[Column],
    on_text: Report | None,
    request: GenerationRequest,
) -> CompareResult:
    """Fill columns, generation by generation, up to one that is stopped."""
    from nbpeft.model.serving import blended

    started, count = time.perf_counter(), len(batch.prompts)
    filled = [dataclasses.replace(column, answers=(Answer(),) * count) for column in columns]
    together = [place for place, column in enumerate(filled) if column.row]
    passes = [[place] for place, column in enumerate(filled) if not column.row]
    if together:
        passes.insert(0, together)

    def result(status: Any) -> CompareResult:
        seconds = time.perf_counter() - started
        return CompareResult(tracked.name, batch.prompts, tuple(filled), seconds, len(passes), status, batch.form)

    def fill(places: list[int], answers: list[Answer]) -> None:
        for number, place in enumerate(places):
            mine = tuple(answers[number * count : (number + 1) * count])
            filled[place] = dataclasses.replace(filled[place], answers=mine)

    if on_text is not None:
        on_text(result("running"))
    for places in passes:

        def report(answers: list[Answer], places: list[int] = places) -> None:
            fill(places, answers)
            if on_text is not None:
                on_text(result("running"))

        first = filled[places[0]]
        rows = [filled[place].row for place in places] if first.row else None
        request = dataclasses.replace(request, rows=rows, report=None if on_text is None else report)
        with nullcontext() if first.row else blended(tracked.manager, dict(first.weights)):
            answers, complete = generate_batch(tracked.model, batch, request)
        fill(places, answers)
        if not complete:
            return result("stopped")
    return result("finished")


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
