"""Turns of other threads between the steps of a training that runs in the background.

    training thread   step ── yield_between_steps() ── step ──          the model as in a training without any turn
                                 │        ▲
    another thread          hold(): evaluation mode, no gradients; its random numbers are not the training's

Whoever calls the model waits for the end of the step; then each who waits has one turn, in the order in which they
came, and those who come meanwhile wait for the next step: of n threads that never pause each has as many turns as the
training has steps. Whoever would change its adapters is refused at once.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nbpeft._util.interrupts import HeldInterrupts, RunningBlock, wait_for
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.changes.random_numbers import random_state, set_random_state
from nbpeft.errors import BusyError

_STEP = 0.05
"""Seconds after which the training looks whether a turn has ended without saying so."""


class StepGate:
    """Who may use a model that one thread trains.

    Args:
        model: in training; held weakly.
        description: what is refused is told, e.g. ``training sql``.
    """

    def __init__(self, model: nn.Module, description: str) -> None:
        self.description = description
        self._model = weakref.ref(model)
        self._condition = threading.Condition()
        self._owner: int | None = None
        self._outside = random_state()
        self._waiting: deque[RunningBlock] = deque()
        self._admitted: list[RunningBlock] = []
        self._taken: RunningBlock | None = None
        self._ended = False

    # The thread that trains

    def acquire(self) -> None:
        """Makes the calling thread the one that trains. Until then nobody gets a turn."""
        self._owner = threading.get_ident()

    def yield_between_steps(self, hurried: Callable[[], bool] = lambda: False) -> bool:
        """Lets each who waits now take one turn, and returns when they are done; without any it returns at once.

        Args:
            hurried: asked meanwhile; once it is true, nobody begins a turn any more.

        Returns:
            Whether anybody waited.
        """
        model = self._model()
        if not self._waiting or model is None or hurried():
            return False
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
        """Lets everybody in: the training is over."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _is_taken(self) -> bool:
        """Whether somebody is inside; an interruption can keep a block from saying that it has ended."""
        if self._taken is not None and not self._taken.runs():
            self._taken = None
        return self._taken is not None

    # All others

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread trains the model."""
        return self._owner == threading.get_ident()

    def refuse(self) -> None:
        """Refuses a change of the adapters by a thread that does not train them.

        Raises:
            BusyError: it is another thread.
        """
        if not self.is_mine and not self._ended:
            raise BusyError(
                f"busy: {self.description}; try again when it has finished, or stop it", running=self.description
            )

    @contextmanager
    def hold(self, *inside: str) -> Iterator[None]:
        """Context manager: the model is this thread's, in evaluation mode and without gradients, until the block ends.

        It waits for the end of the step that runs. In the thread that trains, inside another turn and after the
        training it changes nothing.

        Args:
            inside: modules that enter it for somebody else, whose block it is.
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
        with HeldInterrupts(), self._condition:
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
        with HeldInterrupts(), self._condition:
            if self._taken is block:
                self._taken = None
            self._condition.notify_all()
