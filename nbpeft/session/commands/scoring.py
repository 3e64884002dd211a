"""Scoring the base model and its adapters on rows with references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbpeft.display.numbers import plural
from nbpeft.errors import AdapterError, cut
from nbpeft.session.checks import names_of
from nbpeft.session.prompts import chosen_tokenizer
from nbpeft.session.results.comparing import BASE

if TYPE_CHECKING:
    from nbpeft.scoring.result import ScoreResult
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.training import RunControl
    from nbpeft.training.data import HeldOut


def score(
    ctx: SessionContext,
    /,
    data: Any = None,
    *,
    metric: Any = None,
    adapters: Any = None,
    include_base: bool = True,
    held_out: bool = False,
    tokenizer: Any = None,
    on_progress: Callable[[ScoreResult], object] | None = None,
    on_control: Callable[[RunControl], object] | None = None,
    model: ModelLike = None,
    **options: Any,
) -> ScoreResult:
    """Score the base model and adapters on rows with references, in the same batches; see ``nbpeft.score``.

    The active adapters do not change. While a training runs in the background, the rows are scored between two of its
    steps. After an interruption the result has the status ``stopped`` and the items so far.

    Args:
        data: rows in every form that ``train`` takes, or where they are; None with ``general``.
        metric: name of a metric, a function ``(answer, row) -> bool | float``, or several in a list; None for
            ``exact``, and ``accuracy`` for a classifier of texts.
        adapters: names of the adapters to score, ``a+b`` for the sum of two; None for all.
        include_base: whether to score the base model, too.
        held_out: score only the rows of ``data`` that were held out from the trainings of all these adapters.
        tokenizer: the model's tokenizer; the last one given if None.
        on_progress: called with the result so far, several times per second.
        on_control: called with the control on which a stop can be requested from any thread.
        model: an adapted model.
        **options: further arguments of ``nbpeft.score``, e.g. ``strip`` or ``batch_size``.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterError: with ``held_out``, no row was held out, or it is not known which.
        ConfigError: an argument is invalid, or a metric does not fit the model.
        TrainingError: the rows cannot be read, or a metric fails on all rows of the first batch.
    """
    from nbpeft.scoring.score import score as score_rows
    from nbpeft.scoring.settings import parts_of
    from nbpeft.training.monitor.control import RunControl

    control = RunControl()
    names = None if adapters is None else list(names_of(adapters))
    named = (part for name in names or () for part in parts_of(str(name), ctx.models.have))
    tracked = ctx.find_adapted(model, command="score", adapters=[name for name in named if name != BASE])
    chosen = chosen_tokenizer(ctx, tracked, tokenizer)
    with ctx.command("scoring", slow=True) as notes:
        if on_control is not None:
            on_control(control)
        if held_out:
            options["held_out"] = _held_out(tracked, names)
        result = score_rows(
            tracked.model,
            data,
            metric=metric,
            tokenizer=chosen,
            adapters=names,
            include_base=include_base,
            on_progress=on_progress,
            should_stop=control.wait_or_stop,
            progress=False,
            name=tracked.name,
            **options,
        )
    for name in {*result.columns} & {*tracked.manager.configs}:
        tracked.scored[name] = tracked.manager.configs[name], tracked.steps_of((name,)), _rows_of_card(result, name)
    return dataclasses.replace(result, notes=(*notes, *result.notes))


def _rows_of_card(result: ScoreResult, name: str) -> tuple[tuple[str, str], ...]:
    """What the card of an adapter says about its score: beside the base, and the first item as an example."""
    others = [BASE] if BASE in result.columns and name != BASE else []
    scores = (f"{title} {result.score_words(title)}" for title in (name, *others))
    items = plural(result.scores[name].count, "row")
    example = next((item for item in result.items if item.prompt), None)
    asked = [] if example is None else [("asked, for example", example.prompt), ("the right answer", example.reference)]
    return (f"{result.metric} on {items}", ", ".join(scores)), *((label, cut(text, 300)) for label, text in asked)


def _held_out(tracked: TrackedModel, names: list[str] | None) -> HeldOut:
    """Returns the rows that none of the adapters has learned."""
    from nbpeft.scoring.settings import parts_of

    configs, available = tracked.manager.configs, tracked.manager.available
    wanted = [*configs] if names is None else [part for name in names for part in parts_of(str(name), available)]
    found: HeldOut | None = None
    for name in wanted:
        config, own = tracked.unlearned.get(name, (None, None))
        if name not in configs or (config is None and names is None):  # refused later; not trained
            continue
        if own is None or config is not configs[name]:
            raise AdapterError(
                f"it is not known which rows were held out from {name!r}: no training in this session recorded them"
            )
        if found is not None and found.total != own.total:
            raise AdapterError(f"{name!r} and other adapters were trained on different rows: score them one by one")
        found = own.also(found)
    if found is None:
        raise AdapterError(f"no adapter of {tracked.name} was trained in this session: held_out needs one that was")
    if not found.numbers:
        raise AdapterError(
            "no row was held out from all trainings of these adapters: eval_data=0.1 of a training holds out a tenth"
        )
    return found
