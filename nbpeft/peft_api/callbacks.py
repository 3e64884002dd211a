"""``peft.tuners.adamss.asa_callback``."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from nbpeft.engine.tree.model_tree import manager_of


class AdamssAsaCallback(TrainerCallback):
    """Reports optimizer steps to the adapters of a model, for Trainers that nbpeft does not patch.

    ``nbpeft.Trainer``, ``nbpeft.train`` and ``start_run()`` report the steps themselves; a second report has no effect.
    """

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lets AdaMSS measure its subspaces while gradients exist, and prune some of them at intervals."""
        manager = manager_of(kwargs["model"]) if kwargs.get("model") is not None else None
        if manager is not None:
            manager.after_backward(state.global_step)
