"""The modules that are called, moved and put into another mode with a model: also those it does not list."""

from __future__ import annotations

from torch import nn


def reached_modules(model: nn.Module) -> list[nn.Module]:
    """Returns all modules that ``train()`` of a model reaches, each once, the model itself first.

    ``modules()`` of a model lists what PEFT's users know; adapters are not among that. A module whose
    ``children()`` are others, too, has ``reached_children()``.
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        if module._modules:  # most have none
            children = getattr(type(module), "reached_children", nn.Module.children)(module)
            waiting.extend(reversed(list(children)))
    return list(found.values())
