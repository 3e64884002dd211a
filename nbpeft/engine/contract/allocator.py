"""What shares a budget out among the layers of an adapter as it trains: ranks, subspaces."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from nbpeft.engine.contract.shared_state import Together
from nbpeft.engine.contract.training_hooks import HasTrainingState, LearnsWithHooks


class Allocator(Together, LearnsWithHooks, HasTrainingState):
    """Knows the adapters of all layers, and is told of each optimizer step.

    Args:
        config: of the adapter.
    """

    effect_without_step: ClassVar[str]
    """What does not happen where nobody tells it of a step, as the start of a sentence."""

    sums: list[Tensor] | None = None
    seen: tuple[Tensor | None, int] = (None, 0)
    reported: bool = False
    warned: bool = False

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
        self.bind(reported=True)
        gradient, version = self._gradient()
        seen, seen_version = self.seen
        if gradient is None or (gradient is seen and version == seen_version):
            return
        with torch.no_grad():
            self.allocate(step)
        self.bind(seen=self._gradient())

    def extra_loss(self) -> Tensor | None:
        """None; see ``LearnsWithHooks``."""
        self.warn_if_not_stepped()
        return None

    def warn_if_not_stepped(self) -> None:
        """Warns in the second step of a training that nobody tells it of."""
        if self.reported or self.warned or not torch.is_grad_enabled():
            return
        before = self.sums
        sums = [parameter.detach().sum() for adapter in self.adapters.values() for parameter in adapter.parameters()]
        self.bind(sums=sums)
        if before is None or all(torch.equal(*pair) for pair in zip(before, sums, strict=True)):
            return
        self.bind(warned=True)
        warnings.warn(
            f"{self.effect_without_step} unless it is told of each step: call "
            "model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
            stacklevel=12,  # the caller of the model, or above
        )

    def _gradient(self) -> tuple[Tensor | None, int]:
        """One of the gradients that are there, and its version: fused optimizers do not change that of a parameter."""
        parameters = (parameter for adapter in self.adapters.values() for parameter in adapter.parameters())
        gradient = next((one.grad for one in parameters if one.grad is not None), None)
        return gradient, -1 if gradient is None else gradient._version


def update_and_allocate(manager: Any, global_step: int) -> None:
    """Measures what matters in the adapters that train and takes away what does not, where it is time.

    The Trainer, ``nbpeft.train`` and ``track()`` do it; a loop of one's own calls it in each step between
    ``optimizer.step()`` and ``zero_grad()``.

    Args:
        manager: of the model.
        global_step: number of the optimizer step, from 0.
    """
    manager.after_backward(global_step)
