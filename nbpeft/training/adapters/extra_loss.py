"""Adds the loss terms of methods (AdaLoRA, KaSA, MonteCLoRA) in a Trainer exactly once, whatever ``compute_loss`` does.

The loss may come from the model, a function of the user's, label smoothing or logits. A Trainer
divides it by the number of micro-batches, unless it was normalized over all of them, and then
may multiply it by the number of processes. The loss terms are added to the result of ``compute_loss``,
scaled so that they count once in each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nbpeft.engine.contract.loss_terms import added_by_trainer
from nbpeft.engine.runtime.method_hooks import extra_loss, hooks_in_training
from nbpeft.engine.tree.model_tree import manager_of


def loss_divisor(trainer: Any, items: Any) -> int:
    """The number by which a Trainer divides the loss of a micro-batch.

    Args:
        trainer: a ``transformers.Trainer`` in a training step.
        items: the number of labels in all micro-batches of the step (``num_items_in_batch``), or None.

    Returns:
        The number of micro-batches; 1 if the loss was normalized over all of them.
    """
    from transformers import Trainer

    # Older versions of transformers do not read what a subclass may say of its loss.
    normalized = getattr(trainer, "loss_is_scaled_for_ga", None) if hasattr(Trainer, "loss_is_scaled_for_ga") else None
    if normalized is None:
        normalized = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    return 1 if normalized else _micro_batches(trainer)


@contextmanager
def with_extra_loss(trainer: Any, items: Any) -> Iterator[None]:
    """A block in which ``compute_loss`` adds the loss terms of methods, with this micro-batch's share of the step.

    Args:
        trainer: a ``transformers.Trainer`` in a training step.
        items: the number of labels in all micro-batches of the step (``num_items_in_batch``), or None.
    """
    manager = manager_of(trainer.model)
    if manager is None or next(hooks_in_training(manager), None) is None:
        yield
        return
    compute_loss, own = trainer.compute_loss, vars(trainer).get("compute_loss")

    def computed(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        if not isinstance(loss, Tensor):
            return loss
        extra = extra_loss(manager, loss if step.requested else None)
        return loss if extra is None else loss + step.share * extra.to(loss.device)

    with added_by_trainer(manager, loss_divisor(trainer, items) / _micro_batches(trainer)) as step:
        trainer.compute_loss = computed
        try:
            yield
        finally:
            del trainer.compute_loss
            if own is not None:
                trainer.compute_loss = own


def _micro_batches(trainer: Any) -> int:
    return int(getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps))
