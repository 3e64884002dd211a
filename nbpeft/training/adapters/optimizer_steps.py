"""The one place that calls methods with training hooks (``LearnsWithHooks``) after a step.

    loss.backward() -> optimizer.step() -> manager.after_backward(step) -> optimizer.zero_grad()

At this point the gradients still exist and the weights are updated: what such a method prunes stays
pruned. torch calls the hook after every optimizer step, of a Trainer as well as of a loop in ``start_run()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nbpeft.engine.tree.model_tree import manager_of

_watched: weakref.WeakKeyDictionary[Any, list[Callable[[], int]]] = weakref.WeakKeyDictionary()
"""Manager -> functions that return the number of its steps; the last one is used."""


def watch_steps(model: nn.Module, steps_done: Callable[[], int]) -> Callable[[], None]:
    """Calls ``manager.after_backward`` after each step of an optimizer with parameters of ``model``.

    A model gets only one hook: for a Trainer inside a run, the Trainer's count of steps is used.

    Args:
        model: the model, to which only weak references are kept; one without adapters gets no hook.
        steps_done: returns the number of optimizer steps before the current one.

    Returns:
        A function that removes the hook.
    """
    manager = manager_of(model)
    if manager is None:
        return lambda: None
    counters = _watched.setdefault(manager, [])
    counters.append(steps_done)
    if len(counters) > 1:
        return lambda: _stop(counters, steps_done)
    in_training, its_manager = weakref.ref(model), weakref.ref(manager)
    is_ours: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        model, manager = in_training(), its_manager()
        if model is None or manager is None:
            return
        if optimizer not in is_ours:
            optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            is_ours[optimizer] = any(id(parameter) in optimized for parameter in model.parameters())
        if is_ours[optimizer]:
            manager.after_backward(counters[-1]())

    handle = register_optimizer_step_post_hook(after_step)
    # torch calls the hook for every optimizer of the process, so it has to go with the model.
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
