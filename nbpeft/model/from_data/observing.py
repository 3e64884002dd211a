"""Running a model to observe the inputs of its layers, and restoring its state afterwards."""

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
    """Puts a model into evaluation mode, and restores the mode of each module afterwards."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the training or evaluation mode of each module when the block ends."""
    modes = [(module, module.training) for module in called_modules(model)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Calls a function before each forward of some modules.

    Args:
        modules: name -> module.
        see: called with the name and the positional inputs, or all inputs if there are only keyword arguments.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: see(name, args or tuple(kwargs.values()))

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def base_alone(model: nn.Module) -> AbstractContextManager[Any]:
    """Disables the model's adapters in this thread."""
    manager = manager_of(model)
    return nullcontext() if manager is None else manager.disabled()


def device_of(model: nn.Module) -> torch.device | None:
    """Returns the device of a model's parameters; None if there are several, as accelerate's hooks then move inputs."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else None


def moved(inputs: Any, device: torch.device | None) -> Any:
    """Returns a batch, which may be nested, on a device; None leaves it unchanged.

    Args:
        inputs: a tensor, a batch, or nested mappings and sequences of them.
        device: the device, or None.
    """
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
    """Shows a progress bar and yields a function that sets its count.

    Args:
        total: count at the end.
        title: text before the bar.
        show: False shows nothing.
    """
    if not show:
        yield lambda count: None
        return
    tqdm = importlib.import_module("transformers.utils.logging").tqdm
    with tqdm(total=total, leave=False, desc=title) as bar:

        def report(count: int) -> None:
            bar.n = count
            bar.refresh()

        yield report
