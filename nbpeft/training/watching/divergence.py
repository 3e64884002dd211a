"""Ends a training that diverges, and puts the last good weights back: in memory, without a folder.

A training diverges where its loss is NaN or infinite, or its weights are beyond those that any training leads to (see
``learning_check``). The loss is looked at where a Trainer logs, which waits for the device anyway, and before an
evaluation, a checkpoint and the end.

What trains is copied to host memory before an optimizer step, when the loss of just these weights is known to be
finite. The first copy is made before the first step, the next ones as often as takes one hundredth of the time: after
each step where an adapter is tiny, every few seconds where a copy takes a tenth of one. It takes as much host memory
as the parameters that train.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.engine.contract.trained import mark_saved
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.training.adapters.adapted_model import trainable, trained_names
from nbpeft.training.adapters.learning_check import PATIENCE, TOO_HIGH, have_exploded
from nbpeft.training.adapters.snapshot import Snapshot
from nbpeft.training.disk.agreement import broadcast_from_rank0
from nbpeft.training.monitor.callback import any_process
from nbpeft.training.monitor.run import Run

SHARE = 0.01
"""Of the time, that copies may take."""


class KeepsBest(Protocol):
    """Has the state of the best evaluation, which it puts back when a training ends."""

    @property
    def kept_step(self) -> int | None:
        """Step of that state; None where there is none."""


class Seldom:
    """Says when to do something that may take a share of the time.

    Args:
        clock: seconds, growing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next = clock, float("-inf")

    @property
    def due(self) -> bool:
        """Whether it is time; with several processes the first one says it for all."""
        return bool(broadcast_from_rank0(self._clock() >= self._next))

    def __call__(self, act: Callable[[], object]) -> None:
        """Does it, and puts off the next time by what it took."""
        begun = self._clock()
        act()
        now = self._clock()
        self._next = now + (now - begun) / SHARE


class DivergenceStop(TrainerCallback):
    """Ends a training that diverges, with the last good weights; has to come before callbacks that note the step.

    Args:
        run: told why it ends.
        model: in training.
        clock: seconds, growing.

    Attributes:
        best: what puts the state of the best evaluation back, if anything does.
    """

    best: KeepsBest | None = None

    def __init__(self, run: Run, model: nn.Module, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._model, self._seldom = run, model, Seldom(clock)
        self._good: Snapshot | None = None
        self._losses: Tensor | None = None
        self._reason_before = ""
        self._watches_weights, self._first = True, 0
        self._unsaved: frozenset[str] = frozenset()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies what trains before the first step."""
        manager = manager_of(self._model)
        self._first, self._unsaved = state.global_step, frozenset(() if manager is None else manager.unsaved)
        self._watches_weights = not have_exploded(self._parameters())  # then the run says so, and trains on
        self._seldom(lambda: self._copy(state.global_step))

    def after_batch(self, loss: Tensor) -> None:
        """Takes the loss of a batch in, without waiting for the device."""
        loss = loss.detach().float().sum()
        self._losses = loss if self._losses is None else self._losses + loss

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies what trains where it is time and where it is good."""
        if self._seldom.due:
            self._seldom(lambda: self._copy_if_good(args, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks whether the training diverges, and ends it."""
        whole = control.should_evaluate or control.should_save or state.global_step >= state.max_steps > 0
        whole = whole or state.global_step - self._first == PATIENCE  # when the run looks at the weights, too
        reason = self._reason_before
        if not reason and (control.should_log or whole):
            reason = self._reason(args, weights=whole)
            self._losses = None
        if reason:
            self._put_back(args, state, reason)
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for _, parameter in trainable(self._model))

    def _copy(self, step: int) -> None:
        if self._good is None:
            self._good = Snapshot.of(self._model, step)
        else:
            with HeldInterrupts():  # half of one and half of another would be no copy
                self._good.renew(self._model, step)

    def _copy_if_good(self, args: TrainingArguments, step: int) -> None:
        self._reason_before = self._reason(args, weights=True)
        if not self._reason_before:
            self._copy(step)

    def _reason(self, args: TrainingArguments, *, weights: bool) -> str:
        """Why the training diverges, or the empty string; the same in all processes."""
        total = 0.0 if self._losses is None else float(self._losses)
        if any_process(not math.isfinite(total), args.device):
            kind = "infinite" if math.isinf(total) else "NaN"
            return f"the loss is {kind}: try a lower learning rate, or look at the labels"
        exploded = weights and self._watches_weights and have_exploded(self._parameters())
        if weights and any_process(exploded, args.device):
            return f"weights of {self._run.adapter or 'the model'} have exploded: {TOO_HIGH}"
        return ""

    def _put_back(self, args: TrainingArguments, state: TrainerState, reason: str) -> None:
        """Puts the last good weights back, unless those of the best evaluation will be."""
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        best = best if self.best is None else self.best.kept_step
        if best is not None:
            self._run.diverge(reason, best)
        elif self._good is not None:
            self._good.put_back(self._model)
            self._run.diverge(reason, self._good.step, put_back=True)
            manager = manager_of(self._model)
            if manager is not None and self._good.step == self._first:  # as it was: nothing that could be lost
                mark_saved(manager, *(name for name in trained_names(self._model) if name not in self._unsaved))
