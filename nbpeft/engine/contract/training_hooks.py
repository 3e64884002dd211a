"""What a method does in the steps of a training beside the gradient of its parameters, and what it remembers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nbpeft.engine.contract.adapter import AdapterWeights


class LearnsWithHooks:
    """Takes part in training beside the gradient; an ``Adapter`` or a ``SharedState``.

    The Trainer, ``nbpeft.train`` and ``track()`` call the hooks of the active adapters; a training loop of
    one's own calls ``model.base_model.manager.after_backward(step)`` between the optimizer's step and
    ``zero_grad()``. The extra loss is in the loss that the model returns and, in a Trainer, in that of its
    ``compute_loss``; to any other loss add ``model.base_model.manager.extra_loss()``.
    """

    def after_backward(self, step: int) -> None:
        """Called after an optimizer step, while its gradients are still there; ``step`` counts from 0."""

    def extra_loss(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None


class HasTrainingState:
    """Has more than the tensors of its file on which the steps to come depend; an ``Adapter`` or a ``SharedState``.

    Moving averages, pruned ranks, generators of its own: it is kept with the state of a training and comes back with
    it, so that a resumed training ends as if nothing had happened.
    """

    @property
    def has_training_state(self) -> bool:
        """Whether it has, as it is configured."""
        return True

    @abstractmethod
    def training_state(self) -> dict[str, Tensor]:
        """What that is, by name; tensors that nothing writes to any more."""

    @abstractmethod
    def set_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets that.

        Args:
            state: what ``training_state`` returned earlier; empty for the start of a training.
        """

    def in_training(self, config: Any, weights: AdapterWeights) -> tuple[Any, AdapterWeights]:
        """What a file holds from which a training is resumed.

        Args:
            config: of the adapter.
            weights: what its file holds otherwise.
        """
        return config, weights
