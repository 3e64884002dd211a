"""Marks an adapter as unsaved when an optimizer has changed it, whoever makes the step.

torch calls back after the step of any optimizer: one of a Trainer, or of a loop of somebody's own that
nothing here knows of. What a step has cost once, it does not cost again: an adapter that is marked is
not looked at until it is saved.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nbpeft.engine.contract.manager_protocol import Manager

_managers: weakref.WeakSet[Any] = weakref.WeakSet()
_held: weakref.WeakKeyDictionary[Optimizer, weakref.WeakKeyDictionary[Any, tuple[int, tuple[str, ...]]]]
_held = weakref.WeakKeyDictionary()
"""Optimizer -> manager -> its revision, and the adapters of which the optimizer holds parameters."""
_hooked: list[object] = []
_steps = [0]


def watch(manager: Manager) -> None:
    """Marks the adapters of a manager, which is held weakly, from now on."""
    _managers.add(manager)
    if not _hooked:  # not when this is imported: that changes nothing in other libraries
        _hooked.append(register_optimizer_step_post_hook(_after_step))


def optimizer_steps() -> int:
    """How many steps optimizers have made since the first model was adapted: fused ones leave no other trace."""
    return _steps[0]


def mark_unsaved(manager: Manager, *names: str) -> None:
    """Marks adapters, and tells those who follow the manager."""
    new = set(names) - manager.unsaved
    if new:
        manager.unsaved |= new
        manager.changed()


def mark_saved(manager: Manager, *names: str) -> None:
    """Takes the mark off adapters, and tells those who follow the manager."""
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
            unmarked = [name for name in _held_by(optimizer, manager) if name not in manager.unsaved]
            mark_unsaved(manager, *(name for name in unmarked if _has_gradient(manager, name)))


def _held_by(optimizer: Optimizer, manager: Manager) -> tuple[str, ...]:
    known = _held.setdefault(optimizer, weakref.WeakKeyDictionary())
    revision, names = known.get(manager, (-1, ()))
    if revision != manager.revision:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = tuple(name for name in manager.names if any(id(one) in held for one in manager.parameters(name)))
        known[manager] = manager.revision, names
    return names


def _has_gradient(manager: Manager, name: str) -> bool:
    return any(parameter.grad is not None for parameter in manager.parameters(name))
