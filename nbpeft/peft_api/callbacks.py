"""``peft.tuners.adamss.asa_callback``."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from nbpeft.engine.tree.model_tree import manager_of


class AdamssAsaCallback(TrainerCallback):
    """Tells the adapters of a model of each optimizer step, for a Trainer that nothing of nbpeft tells of it.

    It is not needed beside ``nbpeft.Trainer``, ``nbpeft.train`` or ``track()``, and does nothing twice.
    """

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lets AdaMSS measure its subspaces while the gradients are there, and drop some where it is time."""
        manager = manager_of(kwargs["model"]) if kwargs.get("model") is not None else None
        if manager is not None:
            manager.after_backward(state.global_step)
