"""Ends a training that diverges, and restores the last good weights from memory.

A training diverges if its loss is NaN or infinite, or its weights are larger than any sound training makes them (see
``learning_check``). The loss is checked when a Trainer logs, which waits for the device anyway, and before an
evaluation, a checkpoint and the end.

The trainable parameters are copied to host memory before an optimizer step, once the loss of these very weights is
known to be finite. The first copy is made before the first step, the others so often that copying takes at most 1 % of
the time: after each step for a tiny adapter, every ten seconds if a copy takes 0.1 s. A copy needs as much host
memory as the trainable parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.contract.trained import mark_saved
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.training.adapters.adapted_model import trainable, trained_names
from nbpeft.training.adapters.learning_check import PATIENCE, TOO_HIGH, have_exploded
from nbpeft.training.adapters.snapshot import Snapshot
from nbpeft.training.disk.agreement import broadcast_from_rank0
from nbpeft.training.monitor.callback import any_process
from nbpeft.training.monitor.run import Run

SHARE = 0.01
"""The greatest share of the time spent on copies."""


class KeepsBest(Protocol):
    """A callback with a snapshot of the best evaluation's weights, which it restores when a training ends."""

    @property
    def kept_step(self) -> int | None:
        """The step of the snapshot; None if there is none."""


class Throttle:
    """Decides when to repeat an action that may take at most ``SHARE`` of the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next = clock, float("-inf")

    @property
    def due(self) -> bool:
        """Whether to act now; with several processes rank 0 decides for all."""
        return bool(broadcast_from_rank0(self._clock() >= self._next))

    def __call__(self, act: Callable[[], object]) -> None:
        """Calls the action, and sets the next time according to its duration."""
        begun = self._clock()
        act()
        now = self._clock()
        self._next = now + (now - begun) / SHARE


class DivergenceStop(TrainerCallback):
    """Ends a training that diverges, with the last good weights; must precede callbacks that record the step.

    Attributes:
        best: the callback that restores the best evaluation's weights, if there is one.
    """

    best: KeepsBest | None = None

    def __init__(self, run: Run, model: nn.Module, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._model, self._throttle = run, model, Throttle(clock)
        self._good: Snapshot | None = None
        self._losses: Tensor | None = None
        self._reason_before = ""
        self._watches_weights, self._first = True, 0
        self._unsaved: frozenset[str] = frozenset()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the trainable parameters before the first step."""
        manager = manager_of(self._model)
        self._first, self._unsaved = state.global_step, frozenset(() if manager is None else manager.unsaved)
        # If they exploded before the start, the run warns, and continues.
        self._watches_weights = not have_exploded(self._parameters())
        self._throttle(lambda: self._copy(state.global_step))

    def after_batch(self, loss: Tensor) -> None:
        """Adds the loss of a batch to the total, without waiting for the device."""
        loss = loss.detach().float().sum()
        self._losses = loss if self._losses is None else self._losses + loss

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the trainable parameters if a copy is due and their loss is finite."""
        if self._throttle.due:
            self._throttle(lambda: self._copy_if_good(args, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Checks whether the training diverges, and ends it if so."""
        is_last = state.global_step >= state.max_steps > 0
        is_checked = state.global_step - self._first == PATIENCE  # by the run's own check of the weights
        check_weights = control.should_evaluate or control.should_save or is_last or is_checked
        reason = self._reason_before
        if not reason and (control.should_log or check_weights):
            reason = self._reason(args, weights=check_weights)
            self._losses = None
        if reason:
            self._restore(args, state, reason)
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for _, parameter in trainable(self._model))

    def _copy(self, step: int) -> None:
        if self._good is None:
            self._good = Snapshot.of(self._model, step)
        else:
            with DeferredInterrupts():  # an interrupt in between would leave a mix of two steps
                self._good.renew(self._model, step)

    def _copy_if_good(self, args: TrainingArguments, step: int) -> None:
        self._reason_before = self._reason(args, weights=True)
        if not self._reason_before:
            self._copy(step)

    def _reason(self, args: TrainingArguments, *, weights: bool) -> str:
        """Why the training diverges, or the empty string; the result is the same in all processes."""
        total = 0.0 if self._losses is None else float(self._losses)
        if any_process(not math.isfinite(total), args.device):
            return "the loss is NaN or infinite: try a lower learning rate, or check the labels"
        exploded = weights and self._watches_weights and have_exploded(self._parameters())
        if weights and any_process(exploded, args.device):
            return f"weights of {self._run.adapter or 'the model'} have exploded: {TOO_HIGH}"
        return ""

    def _restore(self, args: TrainingArguments, state: TrainerState, reason: str) -> None:
        """Restores the last good weights, unless those of the best evaluation will be restored at the end."""
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        best = best if self.best is None else self.best.kept_step
        if best is not None:
            self._run.diverge(reason, best)
        elif self._good is not None:
            self._good.restore(self._model)
            self._run.diverge(reason, self._good.step, restored=True)
            manager = manager_of(self._model)
            # The weights from before the run: nothing unsaved was added.
            if manager is not None and self._good.step == self._first:
                mark_saved(manager, *(name for name in trained_names(self._model) if name not in self._unsaved))
