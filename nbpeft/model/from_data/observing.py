"""Running a model to see what its layers get, so that it is as before afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.tree.model_tree import manager_of


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; each of its modules is in its own mode afterwards."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts each module of a model back into the mode it was in."""
    modes = [(module, module.training) for module in called_modules(model)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Calls a function with the name and the inputs of each call of some modules: the positional ones, or else all."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: see(name, args or tuple(kwargs.values()))

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def base_alone(model: nn.Module) -> AbstractContextManager[Any]:
    """The model without its adapters, for this thread."""
    manager = manager_of(model)
    return nullcontext() if manager is None else manager.disabled()


def device_of(model: nn.Module) -> torch.device | None:
    """The device of a model's parameters; None where they are on several, and its own hooks move what it is given."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else None


def moved(inputs: Any, device: torch.device | None) -> Any:
    """A batch, nested or not, on a device; as it is for None."""
    if device is None:
        return inputs
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


@contextmanager
def progress(total: int, title: str, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar, if it is wanted: a function to which the count so far is given."""
    if not show:
        yield lambda count: None
        return
    tqdm = importlib.import_module("transformers.utils.logging").tqdm
    with tqdm(total=total, leave=False, desc=title) as bar:

        def report(count: int) -> None:
            bar.n = count
            bar.refresh()

        yield report
