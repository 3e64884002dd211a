"""Training data before a training."""

from __future__ import annotations

from collections.abc import Mapping
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
    rows: int = 3,
    name: str = "data",
    model: ModelLike = None,
) -> DataResult:
    """Show rows as a model will read them when it is trained on them: through the same code.

    Args:
        data: as for ``train``: rows, or where they are.
        tokenizer: as for ``train``.
        max_length: tokens a row is cut to; by default what the tokenizer allows, at most 1024.
        columns: what the columns are called, e.g. ``{"prompt": "question", "completion": "answer"}``.
        rows: how many to show; some that are cut or left out come after them.
        name: what the data is called.
        model: the model they are for; by default the current one. It matters for encoder-decoders, for classifiers
            and for what it takes of tokenised rows.

    Raises:
        ConfigError: an argument is impossible.
        TrainingError: the data cannot be read; names the row.
    """
    from nbpeft.training import summarize
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
            inputs=None if trained is None else model_inputs(trained),
            rows=rows,
        )
    return DataResult(name, summary, notes_of(summary))
