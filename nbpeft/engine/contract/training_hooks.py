"""Hooks of a method in each training step, and its training state for checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nbpeft.engine.contract.adapter import AdapterWeights


class LearnsWithHooks:
    """Hooks into each training step; for an ``Adapter`` or a ``SharedState``.

    The Trainer, ``nbpeft.train`` and ``start_run()`` call the hooks of the active adapters. A custom training loop
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
    """Has training state in addition to its saved tensors; for an ``Adapter`` or a ``SharedState``.

    The state consists, for example, of moving averages, pruned ranks or separate random generators. It is saved in
    training checkpoints and restored from them, so that a resumed training gives the same result as an uninterrupted
    one.
    """

    @property
    def has_training_state(self) -> bool:
        """Whether the current config needs such state."""
        return True

    @abstractmethod
    def training_state(self) -> dict[str, Tensor]:
        """Name -> tensor of the state; copies, or tensors that are never written to again."""

    @abstractmethod
    def set_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state.

        Args:
            state: an earlier result of ``training_state``; empty to reset the state for a new training.
        """

    def in_training(self, config: Any, weights: AdapterWeights) -> tuple[Any, AdapterWeights]:
        """Returns the config and weights to write to a training checkpoint, if they differ from those of ``save``.

        Args:
            config: config of the adapter.
            weights: the weights that are saved outside of checkpoints.

        Returns:
            The config and weights for the checkpoint.
        """
        return config, weights
