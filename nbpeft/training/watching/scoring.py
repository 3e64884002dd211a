"""Scores the adapter on held-out rows during a training, like an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft._util.hooks import new_scorer
from nbpeft.errors import ConfigError, did_you_mean, in_one_line
from nbpeft.training.data import separator_for
from nbpeft.training.monitor.run import Run
from nbpeft.training.watching.sampling import undisturbed

_TIMES = 10
"""The default number of scores per run."""


class Scorer(Protocol):
    """What scores a model.

    Attributes:
        name: name of the metric that decides which state is the best.
        greater_is_better: whether a greater value of it is better.
        metrics: names of all metrics.
        notes: messages about the rows.
    """

    name: str
    greater_is_better: bool
    metrics: tuple[str, ...]
    notes: tuple[str, ...]

    def values(self, model: nn.Module, should_stop: Callable[[], bool]) -> dict[str, float]:
        """The scores of a model in evaluation mode, by metric; empty if it was stopped."""
        ...


class ScoreCallback(TrainerCallback):
    """Scores the model between two steps, without any other effect on the training, and reports it as an evaluation.

    So the scores are drawn, logged and stored like the metrics of evaluations, and early stopping can go by them.
    If the scoring fails, it ends, but not the run.

    Args:
        run: the run, for messages and Stop.
        model: the model in training.
        scorer: computes the scores.
        every: steps between scores; None: about ``_TIMES`` per run.

    Attributes:
        trainer: the Trainer, which logs the scores.
        metrics: names of the scores.
    """

    trainer: Any = None

    def __init__(self, run: Run, model: nn.Module, scorer: Scorer, every: int | None) -> None:
        self._run, self._model, self._scorer, self._every = run, model, scorer, every
        self._failed = False
        self.metrics = scorer.metrics

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Scores if it is due, and after the last step."""
        every = self._every or max(1, -(-state.max_steps // _TIMES))
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        if not due or self._failed or self._run.control.stop_requested:
            return
        try:
            with undisturbed(self._model):
                values = self._scorer.values(self._model, lambda: self._run.control.stop_requested)
        except Exception as error:
            self._failed = True
            self._run.note(f"no scores: {type(error).__name__}: {in_one_line(error):.200}", warning=True)
            return
        if values:
            self._report({f"eval_{name}": value for name, value in values.items()}, args, state, control)

    def _report(
        self, metrics: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        evaluates = control.should_evaluate
        self.trainer.log(dict(metrics))
        self.trainer.callback_handler.on_evaluate(args, state, control, metrics)
        control.should_evaluate = evaluates  # an evaluation may be due at the same step


def scorer_of(request: Any, fields: dict[str, Any]) -> Scorer | None:
    """The scorer of a training; None if there is nothing to score.

    With a patience, its metric decides which state is the best, unless another one is given.

    Args:
        request: the arguments of the training.
        fields: fields of the training arguments, to which the metric is added.

    Raises:
        ConfigError: an argument is invalid, or has no effect.
        TrainingError: the rows cannot be read.
    """
    if request.score is None:
        if request.metric is not None:
            raise ConfigError("metric says how to score: pass score=…, too", field="metric")
        return None
    if request.every is not None and (type(request.every) is not int or request.every < 1):
        raise ConfigError(f"every must be a number of steps of at least 1, not {request.every!r:.60}", field="every")
    scorer: Scorer = new_scorer(
        request.model,
        request.score,
        "exact" if request.metric is None else request.metric,
        tokenizer=request.tokenizer,
        columns=request.columns,
        max_length=request.max_length,
        separator=separator_for(request.score, request.separator),
        skip_bad=bool(request.skip_bad),
        variables=request.chat_template_kwargs,
    )
    if "loss" in scorer.metrics and request.eval_data is not None:
        raise ConfigError("eval_data measures the loss: leave out either it or the metric loss", field="metric")
    if request.patience is not None and "metric_for_best_model" not in fields:
        fields |= {"metric_for_best_model": scorer.name, "greater_is_better": scorer.greater_is_better}
    best = str(fields.get("metric_for_best_model")).removeprefix("eval_")
    if request.patience is not None and request.eval_data is None and best not in scorer.metrics:
        known, hint = ", ".join(scorer.metrics), did_you_mean(best, scorer.metrics)
        raise ConfigError(
            f"metric_for_best_model={best!r} is not measured: the scores are {known}.{hint}",
            field="metric_for_best_model",
        )
    return scorer
