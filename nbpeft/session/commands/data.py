"""Inspecting training data before a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbpeft._util.logs import collapsed
from nbpeft.errors import ConfigError
from nbpeft.session.results.data import DataResult, notes_of

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext


def data(
    ctx: SessionContext,
    /,
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    skip_bad: bool = False,
    learn: str = "all",
    reasoning: str = "keep",
    long: str = "cut",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    rows: int = 3,
    seed: int | None = None,
    name: str = "data",
    model: ModelLike = None,
) -> DataResult:
    """Show rows as the model will read them in training; uses the same code as training.

    Args:
        data: rows, or where they are, as for ``train``.
        tokenizer: as for ``train``.
        max_length: number of tokens to which rows are cut; by default the tokenizer's limit, at most 1024.
        columns: names of the columns, e.g. ``{"prompt": "question", "completion": "answer"}``.
        separator: what separates the cells of a ``.csv`` or ``.tsv`` file; by default it is detected.
        skip_bad: leave out rows that cannot be read, as for ``train``.
        learn: turns of the assistant to learn, as for ``train``.
        reasoning: what happens to reasoning, as for ``train``.
        long: what happens to rows longer than ``max_length``, as for ``train``.
        chat_template_kwargs: variables for the chat template, as for ``train``.
        rows: number of rows to show; some that are cut or left out are shown in addition.
        seed: seed of the training, with which the rows of a mixture are drawn; by default that of
            ``TrainingArguments``.
        name: display name of the data.
        model: the model to train; by default the current one. It matters for encoder-decoders, for classifiers and for
            which columns of tokenized rows are used.

    Raises:
        ConfigError: an argument is invalid.
        TrainingError: the data cannot be read; the message names the row.
    """
    from nbpeft.training import summarize
    from nbpeft.training.data import ModelInputs
    from nbpeft.training.loop.rows import check_reading, model_inputs

    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ConfigError(f"rows must be a whole number, not {rows!r:.40}", field="rows")
    check_reading(tokenizer, max_length)
    tracked = ctx.models.current if model is None else ctx.find(model)
    trained: Any = tracked.model if tracked is not None else model
    with collapsed():
        summary = summarize(
            data,
            tokenizer,
            max_length=max_length,
            columns=columns,
            separator=separator,
            skip_bad=skip_bad,
            learn=learn,
            reasoning=reasoning,
            long=long,
            chat_template_kwargs=chat_template_kwargs,
            inputs=replace(ModelInputs() if trained is None else model_inputs(trained), kind=None),
            rows=rows,
            seed=seed,
        )
    return DataResult(name, summary, notes=notes_of(summary))
