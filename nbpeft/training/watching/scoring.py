"""Scores the adapter on held-out rows during a training, like an evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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


class Scorer(ABC):
    """What scores a model.

    Attributes:
        name: name of the metric that decides which state is the best.
        metrics: metric -> whether a greater value of it is better.
        notes: messages about rows that are left out or cut.
        prompts: token ids of the prompt of each row, or of all of it for a classifier; empty for other rows.
        failures: messages about the last scores: outputs that are not numbers, answers on which a metric failed.
    """

    name: str
    metrics: Mapping[str, bool]
    notes: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...] = ()
    failures: tuple[str, ...] = ()

    @abstractmethod
    def values(
        self, model: nn.Module, should_stop: Callable[[], bool], adapters: Sequence[str] = ()
    ) -> list[dict[str, float]]:
        """The scores by metric of each adapter, or of the active adapters together; empty if it was stopped."""


class Scored(Protocol):
    """An adapter of a sweep, which is scored on its own.

    Attributes:
        name: its name.
    """

    name: str

    def evaluated(self, step: int, args: TrainingArguments, reported: Mapping[str, float]) -> None:
        """Records an evaluation."""


class ScoreCallback(TrainerCallback):
    """Scores the model between two steps, without any other effect on the training, and reports it as an evaluation.

    So the scores are drawn, logged and stored like the metrics of evaluations, and early stopping can monitor them. The
    adapters of a sweep are scored together, each on its own; the values of the best one stand for all.
    If the scoring fails, it ends, but not the run.

    Args:
        run: the run, for messages and Stop.
        model: the model in training.
        scorer: computes the scores.
        every: steps between scores; None: about ``_TIMES`` per run.
        members: returns the adapters of a sweep that are trained; None for another training.

    Attributes:
        trainer: the Trainer, which logs the scores.
        metrics: names of the scores.
    """

    trainer: Any = None

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        scorer: Scorer,
        every: int | None,
        members: Callable[[], Sequence[Scored]] | None = None,
    ) -> None:
        self._run, self._model, self._scorer, self._every = run, model, scorer, every
        self._members = members
        self._failed = self._warned = False
        self.metrics = tuple(scorer.metrics)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Scores if it is due, and after the last step."""
        every = self._every or max(1, -(-state.max_steps // _TIMES))
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        if not due or self._failed or self._run.control.stop_requested or self._run.diverged:
            return
        members = self._members() if self._members is not None else ()
        if self._members is not None and not members:
            return
        names = [member.name for member in members]
        try:
            with undisturbed(self._model):
                found = self._scorer.values(self._model, lambda: self._run.control.stop_requested, names)
        except Exception as error:
            self._failed = True
            self._run.note(f"no scores: {type(error).__name__}: {in_one_line(error):.200}", warning=True)
            return
        if not found:
            return
        if self._scorer.failures and not self._warned:
            self._warned = True
            self._run.note(f"scores at step {state.global_step:,}: {self._scorer.failures[0]}", warning=True)
        reported = [{f"eval_{name}": value for name, value in values.items()} for values in found]
        for member, metrics in zip(members, reported, strict=False):
            member.evaluated(state.global_step, args, metrics)
        best = min(reported, key=self._rank)
        self._report(best, named_metrics(dict(zip(names, reported, strict=False))), args, state, control)

    def make_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Scores a resumed run if that was due at its step and is not logged: it was stopped or killed before."""
        logged = (entry for entry in state.log_history if entry.get("step") == state.global_step)
        if state.global_step and not any(f"eval_{self._scorer.name}" in entry for entry in logged):
            self.on_step_end(args, state, control)

    def _rank(self, reported: Mapping[str, float]) -> float:
        value = reported[f"eval_{self._scorer.name}"]
        return math.inf if math.isnan(value) else -value if self._scorer.metrics[self._scorer.name] else value

    def _report(
        self,
        metrics: dict[str, float],
        of_members: Mapping[str, float],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        logs, evaluates = control.should_log, control.should_evaluate
        self.trainer.log({**metrics, **of_members})
        self.trainer.callback_handler.on_evaluate(args, state, control, metrics)
        # The loss and an evaluation may be due at the same step.
        control.should_log, control.should_evaluate = logs, evaluates


def named_metrics(reported: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of the adapters of a sweep for a log, e.g. ``eval_exact/codes-lr1e-4``; see ``metrics_named``.

    Args:
        reported: adapter -> its metrics.
    """
    return {f"{metric}/{name}": value for name, metrics in reported.items() for metric, value in metrics.items()}


def metrics_named(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metrics of one adapter in a log entry that ``named_metrics`` made."""
    end = f"/{name}"
    return {key.removesuffix(end): value for key, value in entry.items() if key.endswith(end)}


def check_every(value: object) -> None:
    """Raises ConfigError for a number of steps between samples or scores that is neither None nor at least 1."""
    if value is not None and not (type(value) is int and value >= 1):
        raise ConfigError(f"every must be a number of steps of at least 1, not {value!r:.60}", field="every")


def scorer_of(request: Any, fields: dict[str, Any], classes: Any = None) -> Scorer | None:
    """The scorer of a training, whose metric is added to ``fields``; None if there is nothing to score.

    With a patience, and in a sweep, its metric decides which state is the best, unless another one is given.

    Raises:
        ConfigError: an argument is invalid, or has no effect.
        TrainingError: the rows cannot be read.
    """
    if request.score is None:
        for name in ("metric", "max_score_rows", "max_new_tokens"):
            if getattr(request, name) is not None:
                raise ConfigError(f"{name} has no effect without score=…", field=name)
        return None
    check_every(request.every)
    scorer = request.score if isinstance(request.score, Scorer) else _new_scorer(request, classes)
    if "loss" in scorer.metrics and request.eval_data is not None:
        raise ConfigError(
            "the evaluation rows already give the loss: remove either them or the metric loss", field="metric"
        )
    decides = request.patience is not None or request.members is not None
    if decides and "metric_for_best_model" not in fields:
        fields["metric_for_best_model"] = scorer.name
    best = str(fields.get("metric_for_best_model")).removeprefix("eval_")
    if best in scorer.metrics:  # transformers takes a greater value of all but losses as the better one
        fields.setdefault("greater_is_better", scorer.metrics[best])
    if decides and request.eval_data is None and best not in scorer.metrics:
        known, hint = ", ".join(scorer.metrics), did_you_mean(best, scorer.metrics)
        raise ConfigError(
            f"metric_for_best_model={best!r} is not measured: the scores are {known}.{hint}",
            field="metric_for_best_model",
        )
    return scorer


def _new_scorer(request: Any, classes: Any) -> Scorer:
    scorer: Scorer = new_scorer(
        request.model,
        request.score,
        request.metric,
        max_rows=request.max_score_rows,
        max_new_tokens=request.max_new_tokens,
        classes=classes,
        tokenizer=request.tokenizer,
        columns=request.columns,
        max_length=request.max_length,
        separator=separator_for(request.score, request.separator),
        skip_bad=bool(request.skip_bad),
        variables=request.chat_template_kwargs,
        # Reasoning that is not learned is not answered: a reference with it would never be reached.
        reasoning="keep" if request.reasoning == "keep" else "drop",
        long=request.long,
    )
    return scorer
