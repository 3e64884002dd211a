"""What the steps of a Trainer cost: the most that torch has allocated, exactly, and processor time."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from tests.benchmarks.rows_saved_bytes import live_tensors, storages
from tests.memory.measured_peak import peak_of


class StepCosts(TrainerCallback):
    """Measures the steps of a Trainer; the peak is that of the last one, which is not timed.

    Attributes:
        peak: bytes of everything that was there before the step, and the most allocated beside it.
        seconds: processor time of each step, the first and the last included.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.seconds: list[float] = []
        self._profiler: Any = None
        self._standing = 0
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to measure."""
        if state.global_step == state.max_steps - 1:
            gc.collect()
            optimizer = kwargs["optimizer"]
            kept = [value for values in optimizer.state.values() for value in values.values()]
            self._standing = sum(storages([*live_tensors(), *filter(torch.is_tensor, kept)]).values())
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends it."""
        self.seconds.append(time.process_time() - self._started)
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self.peak = self._standing + peak_of(self._profiler)
            self._profiler = None
