"""Marks an adapter as unsaved when any optimizer has changed it.

torch calls the hook here after the step of every optimizer, also in a training loop that does not use
nbpeft. An adapter that is marked already is not examined again until it is saved, so later steps cost
almost nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nbpeft.engine.contract.manager_protocol import Manager

_managers: weakref.WeakSet[Any] = weakref.WeakSet()
_trained: weakref.WeakKeyDictionary[Optimizer, weakref.WeakKeyDictionary[Any, tuple[int, tuple[str, ...]]]]
_trained = weakref.WeakKeyDictionary()
"""Optimizer -> manager -> its revision, and the names of the adapters whose parameters the optimizer has."""
_hooked: list[object] = []
_steps = [0]


def watch(manager: Manager) -> None:
    """Starts to mark the adapters of a manager; only a weak reference to it is stored."""
    _managers.add(manager)
    if not _hooked:  # not at import, because importing nbpeft must not change other libraries
        _hooked.append(register_optimizer_step_post_hook(_after_step))


def optimizer_steps() -> int:
    """Number of optimizer steps since the first model was adapted.

    Needed because a fused optimizer changes parameters without raising their version counters.
    """
    return _steps[0]


def mark_unsaved(manager: Manager, *names: str) -> None:
    """Marks adapters as unsaved, and notifies the manager's subscribers if any was marked as saved.

    Args:
        manager: manager of the model.
        *names: names of the adapters.
    """
    new = set(names) - manager.unsaved
    if new:
        manager.unsaved |= new
        manager.changed()


def mark_saved(manager: Manager, *names: str) -> None:
    """Marks adapters as saved, and notifies the manager's subscribers if any was marked as unsaved.

    Args:
        manager: manager of the model.
        *names: names of the adapters.
    """
    old = set(names) & manager.unsaved
    if old:
        manager.unsaved -= old
        manager.changed()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _steps[0] += 1
    for manager in tuple(_managers):
        if manager.alive:
            unmarked = [name for name in _trained_by(optimizer, manager) if name not in manager.unsaved]
            mark_unsaved(manager, *(name for name in unmarked if _has_gradient(manager, name)))


def _trained_by(optimizer: Optimizer, manager: Manager) -> tuple[str, ...]:
    known = _trained.setdefault(optimizer, weakref.WeakKeyDictionary())
    revision, names = known.get(manager, (-1, ()))
    if revision != manager.revision:
        in_groups = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = tuple(name for name in manager.names if any(id(p) in in_groups for p in manager.parameters(name)))
        known[manager] = manager.revision, names
    return names


def _has_gradient(manager: Manager, name: str) -> bool:
    return any(parameter.grad is not None for parameter in manager.parameters(name))
