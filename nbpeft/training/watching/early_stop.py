"""Stopping when evaluations get no better, with the best state put back: in memory, without a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.errors import ConfigError
from nbpeft.training.adapters.snapshot import Snapshot
from nbpeft.training.monitor.record import is_better, score_of
from nbpeft.training.monitor.run import Run, StopRun

EVALUATIONS = 10
"""Evaluations a run where nobody said how many; three times the patience where that is more."""
_FILE = "early_stop.safetensors"
"""Of a kept state: the weights of the best evaluation, where those are not the state's own."""


class EarlyStop(TrainerCallback):
    """Ends training after so many evaluations without a better one, and keeps the state of the best.

    The block ``with early_stop:`` is around the training.

    Args:
        run: told why it ends.
        model: in training.
        patience: evaluations without improvement that end it.

    Attributes:
        keep_last: keeps the state of the last step, before that of the best is put back into a run that can go on.
    """

    keep_last: Callable[[], None] | None = None

    def __init__(self, run: Run, model: nn.Module, patience: int) -> None:
        self._run, self._model, self._patience = run, model, patience
        self._best: float | None = None
        self._best_step = self._worse = 0
        self._state: Snapshot | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts on from the evaluations of a run that goes on, and takes the state of the best of them."""
        for entry in state.log_history:
            self._is_better(score_of(args, entry), int(entry.get("step", 0)))
        if self._best is None:
            return
        folder = args.resume_from_checkpoint
        file = Path(folder, _FILE) if isinstance(folder, str | os.PathLike) else None
        if self._best_step == state.global_step:
            self._state = Snapshot.of(self._model, self._best_step)
        elif file is not None and file.is_file() and (kept := Snapshot.read(file, self._model)).fits(self._model):
            self._state = kept
        else:
            lost = f"the state of step {self._best_step:,}, the best, was not kept: only a better one can be"
            self._run.note(lost, warning=True)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the state where it is the best, or counts."""
        if self._is_better(score_of(args, metrics or {}), state.global_step):
            self._state = Snapshot.of(self._model, state.global_step)
        elif self._worse >= self._patience:
            control.should_training_stop = True

    @property
    def kept_step(self) -> int | None:
        """Step of the best state, where it is kept."""
        return None if self._state is None else self._state.step

    def _is_better(self, score: float | None, step: int) -> bool:
        if score is None:
            return False
        if is_better(score, self._best):
            self._best, self._best_step, self._worse = score, step, 0
            return True
        self._worse += 1
        return False

    def write(self, folder: Path) -> None:
        """Writes the weights of the best evaluation beside those of a later step.

        Args:
            folder: of a state that is kept.

        Raises:
            OSError: it cannot be written.
        """
        if self._state is not None and self._state.step != self._run.state.step:
            self._state.write(folder / _FILE)

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
        if self._state is None or self._run.state.step == self._state.step:
            return
        if self.keep_last is not None:
            self.keep_last()
        self._state.put_back(self._model)
        self._run.note(f"the state of step {self._state.step:,}, the best, was put back")


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
