"""Scores of a model in training: the same rows, answered by the active adapters as they are at the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nbpeft.scoring.answers import default_limit
from nbpeft.scoring.metrics import AnswerSettings, metrics_of
from nbpeft.scoring.rows import read_rows
from nbpeft.scoring.score import Scoring
from nbpeft.scoring.settings import Column, ScoreSettings

_ACTIVE = Column("active", as_it_is=True)


class Scorer:
    """Scores the active adapters of a model on the same rows again and again.

    Args:
        model: the model.
        rows: the rows, or where they are.
        metric: as for ``score``; the first of several decides which state is the best.
        tokenizer: the tokenizer of the model.
        columns: as for ``score``.
        max_length: as for ``score``.
        separator: as for ``score``.
        skip_bad: as for ``score``.
        variables: variables for the chat template, as far as it has them.

    Attributes:
        name: name of the first metric.
        greater_is_better: whether a greater value of it is better.
        metrics: names of all metrics.
        notes: messages about rows that are left out or cut.

    Raises:
        ConfigError: an argument is invalid, or a metric does not fit the model.
        TrainingError: the rows cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Any,
        metric: Any,
        *,
        tokenizer: Any = None,
        columns: Mapping[str, str] | None = None,
        max_length: int | None = None,
        separator: str | None = None,
        skip_bad: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._metrics, self._tokenizer = metrics_of(metric, AnswerSettings()), tokenizer
        reading: dict[str, Any] = {"columns": columns, "max_length": max_length}
        reading |= {"separator": separator, "skip_bad": skip_bad, "usual_variables": variables}
        self._read = read_rows(model, rows, self._metrics, tokenizer, **reading)
        self.name, self.greater_is_better = self._metrics[0].name, self._metrics[0].greater_is_better
        self.metrics = tuple(item.name for item in self._metrics)
        self.notes = self._read.notes

    def values(self, model: nn.Module, should_stop: Callable[[], bool]) -> dict[str, float]:
        """The scores, by metric; empty if it was stopped.

        Args:
            model: the model in evaluation mode.
            should_stop: called after each token; True ends it.

        Raises:
            KeyboardInterrupt: it was interrupted.
            TrainingError: a metric fails on all rows of the first batch.
        """
        state = Scoring("", (_ACTIVE,), self._metrics, self._read, ScoreSettings(), [])
        limit = default_limit(self._read.rows, self._metrics, stripped=False)
        state.run(model, self._tokenizer, limit, should_stop, lambda: None)
        if not state.is_complete:
            if not should_stop():
                raise KeyboardInterrupt  # the generation swallowed an interrupt that was meant for the training
            return {}
        result = state.result("finished")
        return {metric.name: result.by(metric.name).scores[_ACTIVE.title].value for metric in self._metrics}
