"""The modules that are called, moved and put into another mode with a model, and what runs in their calls."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(vars(torch_module)[f"_global{name}"] for name in _HOOKS)
"""Those that torch runs in the calls of all modules; it fills these dictionaries and never replaces them."""


def is_changed(module: nn.Module) -> bool:
    """Whether a call of a module does something besides what its class says: a hook is on it, or another forward."""
    own = module.__dict__
    return any(own.get(name) for name in _HOOKS) or "forward" in own


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module does what its class says alone: no hook of a person or a library runs in it."""
    return not (any(_GLOBAL_HOOKS) or is_changed(module))


def called_modules(model: nn.Module) -> list[nn.Module]:
    """Returns all modules that ``train()`` of a model reaches, each once, the model itself first.

    ``modules()`` of a model lists what PEFT's users know; adapters are not among that. A module whose
    ``children()`` are others, too, has ``called_children()``.
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        if module._modules:  # most have none
            children = getattr(type(module), "called_children", nn.Module.children)(module)
            waiting.extend(reversed(list(children)))
    return list(found.values())
