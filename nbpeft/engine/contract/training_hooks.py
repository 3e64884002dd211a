"""What a method runs in each training step besides backward, and the state of it that a checkpoint must include."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nbpeft.engine.contract.adapter import AdapterWeights


class LearnsWithHooks:
    """Hooks into each training step; for an ``Adapter`` or a ``SharedState``.

    The Trainer, ``nbpeft.train`` and ``track()`` call the hooks of the active adapters. A custom training loop
    calls ``model.base_model.manager.after_backward(step)`` between the optimizer's step and ``zero_grad()``.
    The extra loss is included in the loss that the model returns and, in a Trainer, in that of its
    ``compute_loss``; to any other loss add ``model.base_model.manager.extra_loss()``.
    """

    def after_backward(self, step: int) -> None:
        """Called after an optimizer step, while its gradients are still available.

        Args:
            step: number of the optimizer step, from 0.
        """

    def extra_loss(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None


class HasTrainingState:
    """Has training state besides its saved tensors; for an ``Adapter`` or a ``SharedState``.

    Moving averages, pruned ranks or its own random generators, for example. The state is saved in training checkpoints
    and restored from them, so that a resumed training gives the same result as an uninterrupted one.
    """

    @property
    def has_training_state(self) -> bool:
        """Whether there is such state with the current config."""
        return True

    @abstractmethod
    def training_state(self) -> dict[str, Tensor]:
        """Name -> tensor of the state; copies, or tensors that are never written to again."""

    @abstractmethod
    def set_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state.

        Args:
            state: what ``training_state`` returned earlier; empty to reset it for a new training.
        """

    def in_training(self, config: Any, weights: AdapterWeights) -> tuple[Any, AdapterWeights]:
        """The config and weights to write to a training checkpoint, if they differ from those of ``save``.

        Args:
            config: of the adapter.
            weights: as they are saved outside of a checkpoint.

        Returns:
            Both as they are written to the checkpoint.
        """
        return config, weights
