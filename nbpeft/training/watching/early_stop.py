"""Early stopping: ends a training when evaluations no longer improve, and restores the best weights from memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from nbpeft.checkpoint import inside
from nbpeft.display.numbers import plural
from nbpeft.errors import ConfigError
from nbpeft.training.adapters.snapshot import Snapshot
from nbpeft.training.monitor.record import is_better, score_of
from nbpeft.training.monitor.run import Run, StopRun

EVALUATIONS = 10
"""The default number of evaluations per run; three times the patience if that is more."""
KEPT = "early_stop.safetensors"
"""The file in a checkpoint with the weights of the best evaluation, if they are not the checkpoint's own."""


class Patience:
    """Counts evaluations without improvement.

    Args:
        most: their greatest number; None for any number.

    Attributes:
        best_step: the step of the best evaluation.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._best: float | None = None
        self.best_step = self._worse = 0

    def is_better(self, score: float | None, step: int) -> bool:
        """Counts an evaluation, and returns whether it is the best one so far.

        Args:
            score: its score, lower is better; None if the metric was not measured, which does not count.
            step: its step.
        """
        if score is None:
            return False
        if is_better(score, self._best):
            self._best, self.best_step, self._worse = score, step, 0
            return True
        self._worse += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether there was no improvement in so many evaluations."""
        return self._most is not None and self._worse >= self._most

    @property
    def has_best(self) -> bool:
        """Whether there was an evaluation with a finite score."""
        return self._best is not None

    def __str__(self) -> str:
        return f"no improvement in {plural(self._most or 0, 'evaluation')}"


class EarlyStop(TrainerCallback):
    """Stops after ``patience`` evaluations without improvement, and restores the weights of the best one.

    The training runs inside the block ``with early_stop:``, at whose end the weights are restored.

    Attributes:
        keep_last: saves a checkpoint of the last step before the best weights are restored, so that the run can be
            resumed.
    """

    keep_last: Callable[[], None] | None = None

    def __init__(self, run: Run, model: nn.Module, patience: int | None) -> None:
        self._run, self._model, self._most, self._patience = run, model, patience, Patience(patience)
        self._state: Snapshot | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In a resumed run, counts the evaluations so far and loads the weights of the best one."""
        note_too_few(self._run, args, state, self._most)
        for entry in state.log_history:
            self._patience.is_better(score_of(args, entry), int(entry.get("step", 0)))
        if not self._patience.has_best:
            return
        best_step, file = self._patience.best_step, kept_file(args)
        if best_step == state.global_step:
            self._state = Snapshot.of(self._model, best_step)
        elif file is not None and (saved := Snapshot.read(file, self._model)).fits(self._model):
            self._state = saved
        else:
            missing = f"the best weights, of step {best_step:,}, were not saved: only a better step can be restored"
            self._run.note(missing, warning=True)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes a snapshot if this evaluation is the best, else counts it towards the patience."""
        if self._patience.is_better(score_of(args, metrics or {}), state.global_step):
            self._state = Snapshot.of(self._model, state.global_step)
        elif self._patience.is_over:
            control.should_training_stop = True

    @property
    def kept_step(self) -> int | None:
        """The step of the best weights; None if there is no snapshot of them."""
        return None if self._state is None else self._state.step

    def write(self, folder: Path) -> None:
        """Writes the best evaluation's weights into the checkpoint of a later step.

        Raises:
            OSError: the file cannot be written.
        """
        if self._state is not None and self._state.step != self._run.state.step:
            self._state.write(folder / KEPT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restores the best weights when the training ends, is stopped or is interrupted, but not when it fails."""
        if kind is None or issubclass(kind, KeyboardInterrupt | StopRun):
            self._restore()

    def _restore(self) -> None:
        if self._patience.is_over:
            self._run.note(f"stopped early: {self._patience}")
        if self._state is None or self._run.state.step == self._state.step:
            return
        if self.keep_last is not None:
            self.keep_last()
        self._state.restore(self._model)
        self._run.restored_step = self._state.step
        self._run.note(f"the best weights, of step {self._state.step:,}, were restored")


def kept_file(args: TrainingArguments) -> Path | None:
    """The file with the best weights in the checkpoint from which a run resumes; None if there is none."""
    folder = args.resume_from_checkpoint
    file = Path(folder, KEPT) if isinstance(folder, str | os.PathLike) else None
    return file if file is not None and inside.leads_to_file(file) else None


def check_patience(patience: object, fields: dict[str, Any], *, evaluates: bool, scores: bool = False) -> None:
    """Refuses an invalid patience, and sets the default evaluation strategy in ``fields``.

    Scores (``scores``) count as evaluations.

    Raises:
        ConfigError: it is not a number of evaluations, there is nothing to evaluate, or ``load_best_model_at_end`` is
            set too.
    """
    if patience is None:
        return
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise ConfigError(f"patience must be a number of evaluations of at least 1, not {patience!r:.60}")
    if not evaluates and not scores:
        raise ConfigError("patience needs evaluation data: pass eval_data=… or score=…", field="patience")
    if fields.get("load_best_model_at_end"):
        raise ConfigError(
            "patience keeps the best weights in memory: remove load_best_model_at_end", field="load_best_model_at_end"
        )
    if scores:
        return
    if never_evaluates(fields):
        raise ConfigError("patience needs evaluations: remove eval_strategy='no'", field="eval_strategy")
    evaluate_usually(fields, 1 / max(EVALUATIONS, 3 * patience))


def note_too_few(run: Run, args: TrainingArguments, state: TrainerState, patience: int | None) -> None:
    """Warns that a run has too few evaluations to be stopped early."""
    by_steps = args.eval_strategy == IntervalStrategy.STEPS and state.eval_steps
    planned = math.ceil(state.max_steps / state.eval_steps) if by_steps else math.ceil(state.num_train_epochs)
    if patience is not None and args.eval_strategy != IntervalStrategy.NO and planned <= patience:
        what = f"patience={patience} cannot stop this run early, which has {plural(planned, 'evaluation')}"
        run.note(f"{what}: lower eval_steps", warning=True)


def never_evaluates(fields: Mapping[str, Any]) -> bool:
    """Whether the evaluation strategy is ``no``."""
    return str(getattr(fields.get("eval_strategy"), "value", fields.get("eval_strategy"))) == "no"


def evaluate_usually(fields: dict[str, Any], share: float) -> None:
    """Adds evaluations after each such share of the run if neither a strategy nor a number of steps is given."""
    if "eval_strategy" not in fields and "eval_steps" not in fields:
        fields |= {"eval_strategy": "steps", "eval_steps": share}
