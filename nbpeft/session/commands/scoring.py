"""Scoring the base model and its adapters on rows with references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbpeft.session.checks import listed
from nbpeft.session.prompts import chosen_tokenizer

if TYPE_CHECKING:
    from nbpeft.scoring.result import ScoreResult
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.training import RunControl


def score(
    ctx: SessionContext,
    /,
    rows: Any = None,
    *,
    metric: Any = None,
    adapters: Any = None,
    base: bool = True,
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
        ctx: context of the session.
        rows: rows in every form that ``train`` takes, or where they are; None with ``general``.
        metric: name of a metric, a function ``(answer, row) -> bool | float``, or several in a list; None for
            ``exact``, and ``accuracy`` for a classifier of texts.
        adapters: names of the adapters to score, ``a+b`` for the sum of two; None for all.
        base: whether to score the base model, too.
        tokenizer: the model's tokenizer; the last one given if None.
        on_progress: called with the result so far, several times per second.
        on_control: called with the control on which a stop can be requested from any thread.
        model: an adapted model.
        **options: further arguments of ``nbpeft.score``, e.g. ``strip`` or ``batch_size``.

    Raises:
        UnknownAdapterError: there is no such adapter.
        ConfigError: an argument is invalid, or a metric does not fit the model.
        TrainingError: the rows cannot be read, or a metric fails on all rows of the first batch.
    """
    from nbpeft.scoring.score import score as score_rows
    from nbpeft.training.monitor.control import RunControl

    control = RunControl()
    tracked = ctx.find_adapted(model, command="score")
    names = None if adapters is None else listed(adapters, "expected the name of an adapter or a list of names")
    chosen = chosen_tokenizer(ctx, tracked, tokenizer)
    with ctx.command("scoring", slow=True) as notes:
        if on_control is not None:
            on_control(control)
        result = score_rows(
            tracked.model,
            rows,
            metric=metric,
            tokenizer=chosen,
            adapters=names,
            base=base,
            on_progress=on_progress,
            should_stop=control.wait_or_stop,
            progress=False,
            name=tracked.name,
            **options,
        )
    return dataclasses.replace(result, notes=(*notes, *result.notes))
