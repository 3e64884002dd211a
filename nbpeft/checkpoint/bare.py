"""A model as it would be without adapters on it: names and modules, wrappers stepped over."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nbpeft.checkpoint.spelling import BASE_LAYER, ORIGINAL_MODULE


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) in the model's order, as ``named_modules`` would give before adapting.

    A module that hangs in two places comes twice: what is tied must not change the result.
    """
    yield from _walk("", model)


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    module = _unwrapped(module)
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(f"{name}.{child_name}" if name else child_name, child)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The frozen module inside adapter wrappers. They are known by the children they have."""
    while True:
        children = module._modules
        if BASE_LAYER in children and "adapters" in children:
            inner = children[BASE_LAYER]
        elif ORIGINAL_MODULE in children and "modules_to_save" in children:
            inner = children[ORIGINAL_MODULE]
        else:
            return module
        if inner is None:
            return module
        module = inner
