"""What shares a budget out among the layers of an adapter as it trains: ranks, subspaces."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from nbpeft.engine.adapter import LearnsWithHooks
from nbpeft.engine.shared_state import Together


class Allocator(Together, LearnsWithHooks):
    """Knows the adapters of all layers, and is told of each optimizer step.

    Args:
        config: of the adapter.
    """

    does_nothing: ClassVar[str]
    """What does not happen where nobody tells it of a step, as the start of a sentence."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.__dict__.update(state_before=None, state_after=None, told=False, warned=False)

    @abstractmethod
    def allocate(self, step: int) -> None:
        """Measures what matters, and takes away what does not where it is time; while the gradients are there.

        Args:
            step: number of the optimizer step, from 0.
        """

    def after_backward(self, step: int) -> None:
        """Allocates; see ``LearnsWithHooks``.

        A second call after one optimizer step, as of a callback beside a Trainer that calls it anyway, does nothing.
        """
        self.__dict__["told"] = True
        if self._state == self.__dict__["state_after"] or not self.adapters:
            return
        with torch.no_grad():
            self.allocate(step)
        self.__dict__["state_after"] = self._state

    def extra_loss(self) -> Tensor | None:
        """None; see ``LearnsWithHooks``."""
        self.warn_untold()
        return None

    def warn_untold(self) -> None:
        """Warns in the second step of a training that nobody tells it of."""
        before, now = self.__dict__["state_before"], self._state
        self.__dict__["state_before"] = now
        if before in (None, now) or self.__dict__["told"] or self.__dict__["warned"]:
            return
        self.__dict__["warned"] = True
        warnings.warn(
            f"{self.does_nothing} unless it is told of each step: call "
            "model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
            stacklevel=12,  # the caller of the model, or above
        )

    @property
    def _state(self) -> int:
        """Another number after each change of the parameters in place."""
        return sum(tensor._version for adapter in self.adapters.values() for tensor in adapter.parameters())


def update_and_allocate(manager: Any, global_step: int) -> None:
    """Measures what matters in the adapters that train and takes away what does not, where it is time.

    The Trainer, ``nbpeft.train`` and ``track()`` do it; a loop of one's own calls it in each step between
    ``optimizer.step()`` and ``zero_grad()``.

    Args:
        manager: of the model.
        global_step: number of the optimizer step, from 0.
    """
    manager.after_backward(global_step)
