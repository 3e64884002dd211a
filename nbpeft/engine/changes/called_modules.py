"""The modules of a model including its adapters, and whether anything but their class runs in their calls."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(vars(torch_module)[f"_global{name}"] for name in _HOOKS)
"""torch's hooks for the calls of all modules. It changes these dictionaries in place, so they can be kept here."""


OUTSIDE = "_nbpeft_outside"
"""Attribute of a base model: what ``outside`` returns."""


def outside(model: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the wrappers of a base model's layers that are not in its module tree, by ``id`` as text."""
    wrappers: dict[str, nn.Module | None] = model.__dict__.get(OUTSIDE, {})
    return wrappers


def is_changed(module: nn.Module) -> bool:
    """Whether a module computes other than its class: it has hooks, or its ``forward`` was replaced."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module runs only what its class defines: no hooks, neither its own nor global ones."""
    before, after, backward_before, backward_after = _GLOBAL_HOOKS
    return not (before or after or backward_before or backward_after or is_changed(module))


def called_modules(model: nn.Module) -> list[nn.Module]:
    """Returns all modules that ``train()`` of a model reaches, each once, the model itself first.

    ``modules()`` lists the tree that PEFT has, without the adapters themselves. Modules whose ``children()``
    differ from the submodules that they call define ``called_children()``, which is used here. Wrappers outside of
    the tree are included.
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        if module._modules:  # most modules are leaves
            children = getattr(type(module), "called_children", nn.Module.children)(module)
            waiting.extend(reversed(list(children)))
        waiting.extend(wrapper for wrapper in outside(module).values() if wrapper is not None)
    return list(found.values())
