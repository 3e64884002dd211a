"""Lets other threads use a model between the steps of a training that runs in the background.

    training thread   step ── yield_between_steps() ── step ──          trains as if no other thread used the model
                                 │        ▲
    another thread          hold(): evaluation mode, no gradients, random numbers apart from those of the training

A thread that calls the model waits until the current step ends. Then each waiting thread gets one turn, in the order
of arrival; threads that arrive during these turns wait for the end of the next step. So every thread gets at most one
turn for each step, and the training always continues. A thread that tries to change the adapters is refused at once.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nbpeft._util.interrupts import DeferredInterrupts, RunningBlock, wait_for
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.changes.random_numbers import random_state, set_random_state
from nbpeft.errors import BusyError

_STEP = 0.05
"""Seconds between checks whether a thread ended its turn without notifying, because it was interrupted."""


class StepGate:
    """Controls which thread may use a model that one thread trains.

    Args:
        model: in training; only a weak reference is stored.
        description: description of the training, for error messages, such as ``training sql``.
    """

    def __init__(self, model: nn.Module, description: str) -> None:
        self.description = description
        self._model = weakref.ref(model)
        self._condition = threading.Condition()
        self._owner: int | None = None
        # Calls between steps have random numbers of their own, so that the training draws what it would draw alone.
        self._outside = random_state()
        self._waiting: deque[RunningBlock] = deque()
        self._admitted: list[RunningBlock] = []
        self._taken: RunningBlock | None = None
        self._ended = False

    # The thread that trains

    def acquire(self) -> None:
        """Makes the calling thread the one that trains; until then no thread gets a turn."""
        self._owner = threading.get_ident()

    def yield_between_steps(self, hurried: Callable[[], bool] = lambda: False) -> bool:
        """Gives each waiting thread one turn, and returns when these have ended; at once if no thread waits.

        Args:
            hurried: called repeatedly; once it returns True, no further turn begins.

        Returns:
            Whether a thread was waiting.
        """
        model = self._model()
        if not self._waiting or model is None or hurried():
            return False
        # Mode and random state are switched here, once for all turns, and not by each thread: only this thread knows
        # that no step is running.
        training = [module for module in called_modules(model) if module.training]
        mine = random_state()
        set_random_state(self._outside)
        for module in training:
            module.training = False
        try:
            with self._condition:
                self._admitted = list(self._waiting)
                self._condition.notify_all()
                while self._admitted or self._is_taken():
                    # With a timeout: a thread whose block was cut off by an interruption does not notify.
                    self._condition.wait(_STEP)
                    if hurried():
                        self._admitted = []
        finally:
            for module in training:
                module.training = True
            self._outside = random_state()
            set_random_state(mine)
        return True

    def end(self) -> None:
        """Opens the gate for all threads, because the training has ended."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _is_taken(self) -> bool:
        """Whether a thread has its turn now.

        ``_taken`` alone does not tell: an interruption between two instructions can skip the block's ``__exit__``.
        """
        if self._taken is not None and not self._taken.runs():
            self._taken = None
        return self._taken is not None

    # All other threads

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread trains the model."""
        return self._owner == threading.get_ident()

    def refuse(self) -> None:
        """Refuses changes of the adapters by any thread but the one that trains.

        Raises:
            BusyError: the calling thread does not train, and the training has not ended.
        """
        if not self.is_mine and not self._ended:
            raise BusyError.while_training(self.description)

    @contextmanager
    def hold(self, *inside: str) -> Iterator[None]:
        """Context manager: one turn of the calling thread, in evaluation mode and without gradients.

        Waits for the end of the current step. Has no effect in the thread that trains, inside another turn of the same
        thread, and after the training.

        Args:
            *inside: names of modules whose context managers enter this one for their caller; frames of these modules
                are skipped when looking for the frame whose block this is.
        """
        if self.is_mine or (self._taken is not None and self._taken.thread == threading.get_ident()):
            yield
            return
        taken = self._take(RunningBlock(__name__, *inside))
        try:
            if taken is None:
                yield
            else:
                with torch.no_grad():
                    yield
        finally:
            if taken is not None:
                self._leave(taken)

    def _take(self, block: RunningBlock) -> RunningBlock | None:
        with DeferredInterrupts(), self._condition:
            self._waiting.append(block)
            try:
                wait_for(self._condition, until=lambda: self._ended or (self._is_next(block) and not self._is_taken()))
                self._taken = None if self._ended else block
            finally:
                self._waiting.remove(block)
                self._admitted = [other for other in self._admitted if other is not block]
                self._condition.notify_all()
            return self._taken

    def _is_next(self, block: RunningBlock) -> bool:
        return bool(self._admitted) and self._admitted[0] is block

    def _leave(self, block: RunningBlock) -> None:
        with DeferredInterrupts(), self._condition:
            if self._taken is block:
                self._taken = None
            self._condition.notify_all()
