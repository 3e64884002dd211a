"""What methods add to the loss (AdaLoRA, KaSA, MonteCLoRA) in a Trainer: once, whatever its ``compute_loss`` does.

The loss may come from the model, from a function of the user's, from smoothed labels or from logits. A Trainer
divides it by the number of micro-batches, or leaves it as it is where it was normalized over all of them, and then
may multiply it by the number of processes. What methods add comes after all of that.
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
    """What a Trainer divides the loss of a micro-batch by.

    Args:
        trainer: a ``transformers.Trainer`` in a training step.
        items: what it counted in all micro-batches of the step (``num_items_in_batch``), or None.

    Returns:
        The number of micro-batches; 1 where the loss was normalized over all of them.
    """
    normalized = getattr(trainer, "loss_is_scaled_for_ga", None)
    if normalized is None:
        normalized = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    return 1 if normalized else _micro_batches(trainer)


@contextmanager
def with_extra_loss(trainer: Any, items: Any) -> Iterator[None]:
    """A block in which the loss of ``compute_loss`` has what methods add to it, for its share of the step.

    Args:
        trainer: a ``transformers.Trainer`` in a training step.
        items: what it counted in all micro-batches of the step (``num_items_in_batch``), or None.
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
