"""Callbacks that processes of a training import."""

from __future__ import annotations

import os
import signal
from typing import Any

from transformers import TrainerCallback

from nbpeft.training import Trainer, keeping


class FailsInTheSecond(TrainerCallback):
    """Raises after two steps in process 1."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 2:
            raise ValueError("the second of them is out of rows")


class BreaksInTheSecond(Trainer):
    """The loss of process 1 is no number from the seventh step on."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if os.environ["RANK"] == "1" and self.state.global_step >= 6 else loss


class KeepsEachState(TrainerCallback):
    """Lets a run keep its state after each step, and not every few seconds; process 1 can die after a step.

    Args:
        dies_after: steps; None where it lives.
    """

    def __init__(self, dies_after: int | None = None) -> None:
        self.dies_after = dies_after

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keeping.SHORTEST, keeping.SHARE = 0.0, 1e9

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
