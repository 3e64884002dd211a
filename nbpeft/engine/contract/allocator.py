"""Base class of methods that distribute a budget (of ranks or subspaces) over the layers during training."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from nbpeft.engine.contract.shared_state import Together
from nbpeft.engine.contract.training_hooks import HasTrainingState, LearnsWithHooks


class Allocator(Together, LearnsWithHooks, HasTrainingState):
    """Distributes a budget over the adapters of all layers, after each optimizer step.

    Args:
        config: config of the adapter.

    Attributes:
        sums: sum of each parameter at the last call of ``warn_if_not_stepped``, to detect optimizer steps.
        seen: a gradient at the last allocation, and its version counter, to detect a second call after the same step.
        reported: whether ``after_backward`` was ever called.
        warned: whether the warning about missing calls was shown.
    """

    effect_without_step: ClassVar[str]
    """Beginning of the warning that ``after_backward`` is never called: the effect that is missing."""

    sums: list[Tensor] | None = None
    seen: tuple[Tensor | None, int] = (None, 0)
    reported: bool = False
    warned: bool = False

    @abstractmethod
    def allocate(self, step: int) -> None:
        """Updates the importance scores, and removes the least important parts at the steps of the schedule.

        Gradients of the step are still available.

        Args:
            step: number of the optimizer step, from 0.
        """

    def after_backward(self, step: int) -> None:
        """Allocates; see ``LearnsWithHooks``.

        A second call after the same optimizer step does nothing, because a user's callback may call it in addition to
        the Trainer.
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
        self.warn_if_not_stepped()
        return None

    def warn_if_not_stepped(self) -> None:
        """Warns once parameters have changed although ``after_backward`` was never called."""
        if self.reported or self.warned or not torch.is_grad_enabled():
            return
        before = self.sums
        sums = [parameter.detach().sum() for adapter in self.adapters.values() for parameter in adapter.parameters()]
        self.bind(sums=sums)
        if before is None or all(torch.equal(*pair) for pair in zip(before, sums, strict=True)):
            return
        self.bind(warned=True)
        warnings.warn(
            f"{self.effect_without_step} unless the training loop reports each step: call "
            "model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
            stacklevel=12,  # the caller of the model, or above
        )

    def _gradient(self) -> tuple[Tensor | None, int]:
        """Any one of the gradients, and its version counter; -1 without a gradient.

        The version counter of a parameter cannot be used: fused optimizers write to parameters without raising it.
        """
        parameters = (parameter for adapter in self.adapters.values() for parameter in adapter.parameters())
        gradient = next((parameter.grad for parameter in parameters if parameter.grad is not None), None)
        return gradient, -1 if gradient is None else gradient._version


def update_and_allocate(manager: Any, global_step: int) -> None:
    """Updates the importance scores of the active adapters, and prunes them at the steps of their schedules.

    The Trainer, ``nbpeft.train`` and ``start_run()`` call it; a custom training loop calls it in each step, between
    ``optimizer.step()`` and ``zero_grad()``.

    Args:
        manager: the model's ``AdapterManager``.
        global_step: number of the optimizer step, from 0.
    """
    manager.after_backward(global_step)
