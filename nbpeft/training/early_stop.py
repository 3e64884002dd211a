"""Stopping when evaluations get no better, with the best state put back: in memory, without a folder."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.errors import ConfigError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.training.adapted import trainable
from nbpeft.training.callback import score_of
from nbpeft.training.run import Run, StopRun

EVALUATIONS = 10
"""Evaluations a run where nobody said how many; three times the patience where that is more."""


class EarlyStop(TrainerCallback):
    """Ends training after so many evaluations without a better one, and keeps the state of the best.

    The block ``with early_stop:`` is around the training.

    Args:
        run: told why it ends.
        model: in training.
        patience: evaluations without improvement that end it.
    """

    def __init__(self, run: Run, model: nn.Module, patience: int) -> None:
        self._run, self._model, self._patience = run, model, patience
        self._best: float | None = None
        self._best_step = self._worse = 0
        self._state: dict[str, Tensor] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the state where it is the best, or counts."""
        score = score_of(args, metrics or {})
        if score is None:
            return
        if self._best is None or score < self._best:
            self._best, self._best_step, self._worse = score, state.global_step, 0
            self._state = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors()}
            return
        self._worse += 1
        if self._worse >= self._patience:
            control.should_training_stop = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """At the end of a training, also an early one, puts the best state back."""
        if kind is None or issubclass(kind, KeyboardInterrupt | StopRun):
            self._put_back()

    def _put_back(self) -> None:
        if self._worse >= self._patience:
            evaluations = f"{self._patience} evaluation{'' if self._patience == 1 else 's'}"
            self._run.note(f"stopped early: no better in {evaluations}")
        if not self._state or self._run.state.step == self._best_step:
            return
        with HeldInterrupts(to_the_end=True), torch.no_grad():  # a second interruption must not mix two states
            for name, tensor in self._tensors():
                tensor.copy_(self._state[name])
        self._run.note(f"the state of step {self._best_step:,}, the best, was put back")

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter.detach()) for name, parameter in trainable(self._model)]


def check_patience(patience: object, fields: dict[str, Any], *, evaluates: bool) -> None:
    """Refuses a patience that cannot be, and says when to evaluate where nobody did.

    Args:
        patience: as given.
        fields: fields of the arguments, which get an evaluation strategy.
        evaluates: whether there is held-out data.

    Raises:
        ConfigError: it is not a number of evaluations, there is nothing to evaluate, or two things keep the best.
    """
    if patience is None:
        return
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise ConfigError(f"patience must be a number of evaluations of at least 1, not {patience!r:.60}")
    if not evaluates:
        raise ConfigError("patience needs data to evaluate on: pass eval_data=…", field="patience")
    if fields.get("load_best_model_at_end"):
        raise ConfigError(
            "patience keeps the best state in memory: leave load_best_model_at_end out", field="load_best_model_at_end"
        )
    strategy = str(getattr(fields.get("eval_strategy"), "value", fields.get("eval_strategy")))
    if strategy == "no":
        raise ConfigError("patience needs evaluations: leave eval_strategy='no' out", field="eval_strategy")
    if "eval_strategy" not in fields and "eval_steps" not in fields:
        fields |= {"eval_strategy": "steps", "eval_steps": 1 / max(EVALUATIONS, 3 * patience)}
