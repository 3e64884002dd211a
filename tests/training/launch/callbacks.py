"""Callbacks that processes of a training import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from nbpeft.training import Trainer
from nbpeft.training.monitor import run_checkpointer


def of_the_row(answer: str, row: Any) -> float:
    """A metric that depends on the row alone, for an equal score with any number of processes."""
    return int(row["prompt"].partition(" ")[0]) / 10


class FailsInTheSecond(TrainerCallback):
    """Raises after two steps in process 1."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 2:
            raise ValueError("the second of them is out of rows")


class HoldsAShareOfTheCodes(TrainerCallback):
    """Raises if a process has more than its share of the 4-bit codes of a base.

    Args:
        codes: bytes of all codes.
    """

    def __init__(self, codes: int) -> None:
        self.codes = codes

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        import bitsandbytes

        parts = [
            module.weight._local_tensor for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
        ]
        found = sum(part.untyped_storage().nbytes() for part in parts)
        share = self.codes / int(os.environ["WORLD_SIZE"])
        if not share <= found <= share + 4 * len(parts):
            raise ValueError(f"{found} bytes of {self.codes} are in this process")


class LeavesTheOtherWaiting(TrainerCallback):
    """Process 1 does no second step, so that process 0 waits for its gradients; each leaves its number in a folder.

    Args:
        folder: that is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vars(sys.modules["__main__"]).update(_STEP_ALONE=0.5, _END_ALONE=0.5)
        (self.folder / os.environ["RANK"]).write_text(str(os.getpid()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 1:
            (self.folder / "waiting").touch()
            time.sleep(600)


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
        run_checkpointer.SHORTEST, run_checkpointer.SHARE = 0.0, 1e9

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
