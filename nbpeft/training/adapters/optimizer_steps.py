"""The one place where methods that learn with hooks (``LearnsWithHooks``) get their turn in a training step.

    loss.backward() -> optimizer.step() -> manager.after_backward(step) -> optimizer.zero_grad()

The gradients are still there and the weights have moved already: what such a method prunes stays
pruned. torch calls back after every optimizer step, whoever makes it: a Trainer or a loop in ``track()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nbpeft.engine.tree.model_tree import manager_of

_watched: weakref.WeakKeyDictionary[Any, list[Callable[[], int]]] = weakref.WeakKeyDictionary()
"""Manager -> who counts its steps, the last one being asked."""


def watch_steps(model: nn.Module, steps_done: Callable[[], int]) -> Callable[[], None]:
    """Calls ``manager.after_backward`` after each step of an optimizer that holds parameters of ``model``.

    A model that is watched already is not watched twice: in a Trainer within a run the Trainer counts.

    Args:
        model: with adapters, or one without, which is not watched; held weakly.
        steps_done: returns the number of optimizer steps before the current one.

    Returns:
        A function that ends it.
    """
    manager = manager_of(model)
    if manager is None:
        return lambda: None
    counting = _watched.setdefault(manager, [])
    counting.append(steps_done)
    if len(counting) > 1:
        return lambda: _stop(counting, steps_done)
    in_training, its_manager = weakref.ref(model), weakref.ref(manager)
    is_ours: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        model, manager = in_training(), its_manager()
        if model is None or manager is None:
            return
        if optimizer not in is_ours:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            is_ours[optimizer] = any(id(parameter) in held for parameter in model.parameters())
        if is_ours[optimizer]:
            manager.after_backward(counting[-1]())

    handle = register_optimizer_step_post_hook(after_step)
    weakref.finalize(manager, handle.remove).atexit = False

    def end() -> None:
        handle.remove()
        manager = its_manager()
        if manager is not None:
            _watched.pop(manager, None)

    return end


def _stop(counting: list[Callable[[], int]], steps_done: Callable[[], int]) -> None:
    if steps_done in counting:
        counting.remove(steps_done)
