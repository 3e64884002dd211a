"""The modules that are called, moved and put into another mode with a model: also those it does not list."""

from __future__ import annotations

from torch import nn


def reached_modules(model: nn.Module) -> list[nn.Module]:
    """Returns all modules that ``train()`` and ``to()`` of a model reach, each once, the model itself first.

    ``modules()`` of a model lists what PEFT's users know; adapters are not among that.
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(reversed(list(module.children())))
    return list(found.values())
