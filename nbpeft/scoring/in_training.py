"""Scores of a model in training: the same rows, answered by its adapters as they are at the time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nbpeft.display.numbers import count
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.model.saving.sharded import is_sharded
from nbpeft.names import DEFAULT_SEED
from nbpeft.scoring.answers import default_limit
from nbpeft.scoring.metrics import AnswerSettings, generates, metrics_of
from nbpeft.scoring.result import ScoreResult
from nbpeft.scoring.rows import TRIED, ScoredRows, read_rows, usual_metric
from nbpeft.scoring.score import Scoring
from nbpeft.scoring.settings import Column, ScoreSettings, adapter_columns
from nbpeft.training.adapters.adapted_model import active_names
from nbpeft.training.data.classes import Classes
from nbpeft.training.disk.agreement import gathered, own_share
from nbpeft.training.watching.sampling import undisturbed
from nbpeft.training.watching.scoring import Scorer

MOST_ANSWERS = 200
"""The default number of rows whose answers are generated each time: with ten scores a run, 2,000 answers."""
_TRIAL_TOKENS = 16
"""The number of tokens of the first answers on which a metric is tried; if it fails on them, on whole ones."""


class RowScorer(Scorer):
    """Scores adapters of a model on the same rows again and again.

    The processes of a training share the rows out. If each of them has a part of the model, all of them answer all
    rows.

    Args:
        model: the model.
        rows: the rows, or where they are.
        metric: as for ``score``, None for the usual one; the first of several decides which state is the best.
        max_rows: the greatest number of rows; of more than that, a random sample is scored, the same one each time.
            None for ``MOST_ANSWERS`` if answers are generated, and for all rows otherwise.
        max_new_tokens: as for ``score``.
        classes: the classes of a classifier, if its training rows name them; by default as in its config.
        tokenizer: the tokenizer of the model.
        columns: as for ``score``.
        max_length: as for ``score``.
        separator: as for ``score``.
        skip_bad: as for ``score``.
        variables: variables for the chat template, as far as it has them.
        reasoning: ``drop`` removes the reasoning of the assistant from references, ``keep`` does not.
        long: what happens to rows that are too long, where it has an effect.

    Raises:
        ConfigError: an argument is invalid, or a metric does not fit the model.
        TrainingError: the rows cannot be read, or a metric fails on each of the first references; on each of the
            model's first answers if the rows have no references.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Any,
        metric: Any,
        *,
        max_rows: int | None = None,
        max_new_tokens: int | None = None,
        classes: Classes | None = None,
        tokenizer: Any = None,
        columns: Mapping[str, str] | None = None,
        max_length: int | None = None,
        separator: str | None = None,
        skip_bad: bool = False,
        variables: Mapping[str, Any] | None = None,
        reasoning: str = "keep",
        long: str = "cut",
    ) -> None:
        self._given, self._tokenizer = usual_metric(model) if metric is None else metric, tokenizer
        self._metrics = metrics_of(self._given, AnswerSettings())
        reading: dict[str, Any] = {"columns": columns, "max_length": max_length, "classes": classes}
        reading |= {"separator": separator, "skip_bad": skip_bad, "usual_variables": variables, "reasoning": reasoning}
        reading["usual_long"] = long
        if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
            raise ConfigError(
                f"max_score_rows must be a whole number of at least 1, not {max_rows!r:.40}", field="max_score_rows"
            )
        self._settings = ScoreSettings(max_new_tokens)
        self._settings.check_for(self._metrics)
        self._read = self._sampled(read_rows(model, rows, self._metrics, tokenizer, **reading), max_rows)
        self.name = self._metrics[0].name
        self.metrics = {item.name: item.greater_is_better for item in self._metrics}
        self.notes = self._read.notes
        found = (row.prompt_ids or tuple(row.coded.get("input_ids", ())) for row in self._read.rows)
        self.prompts = tuple(filter(None, found))
        self._try_metrics(model)

    def _sampled(self, read: ScoredRows, max_rows: int | None) -> ScoredRows:
        """The rows that are scored each time."""
        most = max_rows or (MOST_ANSWERS if generates(self._metrics) else len(read.rows))
        if len(read.rows) <= most:
            return read
        chosen = sorted(random.Random(DEFAULT_SEED).sample(range(len(read.rows)), most))
        note = f"{count(most)} of {count(len(read.rows))} are scored, sampled at random (max_score_rows)"
        return replace(read, rows=tuple(read.rows[place] for place in chosen), notes=(*read.notes, note))

    def _try_metrics(self, model: nn.Module) -> None:
        """Tries the metrics of answers on the model's first answers if no row has a reference to try them on."""
        metrics = tuple(metric for metric in self._metrics if metric.needs == "answers")
        if not metrics or any(row.reference for row in self._read.rows) or is_sharded(model):
            return
        rows = replace(self._read, rows=self._read.rows[:TRIED])
        for limit in (min(_TRIAL_TOKENS, self._limit), self._limit):
            state = Scoring("", (Column("model", as_it_is=True),), metrics, rows, ScoreSettings(batch_size=TRIED), [])
            try:
                with undisturbed(model):
                    state.run(model, self._tokenizer, limit, None, lambda: None)
                break
            except TrainingError:  # what is cut may not be readable, and longer answers may be
                if limit == self._limit:
                    raise
        if not state.is_complete:
            raise KeyboardInterrupt  # the generation swallowed it

    @property
    def _limit(self) -> int:
        """The greatest number of tokens of an answer."""
        return self._settings.max_new_tokens or default_limit(self._read.rows, self._metrics, stripped=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_metrics"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _metrics=metrics_of(state["_given"], AnswerSettings()))

    def values(
        self, model: nn.Module, should_stop: Callable[[], bool], adapters: Sequence[str] = ()
    ) -> list[dict[str, float]]:
        """The scores by metric, of each adapter; empty if it was stopped.

        Args:
            model: the model in evaluation mode.
            should_stop: called after each token; True ends it.
            adapters: what answers; the active adapters together if none is named.

        Raises:
            KeyboardInterrupt: it was interrupted.
            TrainingError: a metric fails on all rows of the first batch, or another process failed.
        """
        active = Column(" + ".join(active_names(model)) or "model", as_it_is=True)
        columns = adapter_columns(model, adapters) or (active,)
        parts = gathered(lambda: self._part(model, columns, should_stop))
        results = [part for part in parts if part is not None]
        if len(results) < len(parts):
            return []
        result, self.failures = results[0], tuple(note for part in results for note in part.notes)
        if not is_sharded(model):
            result = replace(result, items=tuple(item for part in results for item in part.items))
        found = {metric.name: result.by(metric.name).scores for metric in self._metrics}
        return [{name: scores[column.title].value for name, scores in found.items()} for column in columns]

    def _part(
        self, model: nn.Module, columns: tuple[Column, ...], should_stop: Callable[[], bool]
    ) -> ScoreResult | None:
        """The scores of this process's rows; None if it was stopped."""
        rows = self._read.rows if is_sharded(model) else tuple(own_share(self._read.rows))
        state = Scoring("", columns, self._metrics, replace(self._read, rows=rows), self._settings, [])
        state.run(model, self._tokenizer, self._limit, should_stop, lambda: None)
        if state.is_complete:
            return replace(state.result("finished"), notes=tuple(state.failures()))
        if not should_stop():
            raise KeyboardInterrupt  # the generation swallowed an interrupt that was meant for the training
        return None
