"""Tensors that accelerate keeps elsewhere between calls (``cpu_offload``, ``disk_offload``, ``device_map``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import nn

from nbpeft.engine.contract.base import all_onloaded
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import bare_modules


def adapter_onloaded(manager: AdapterManager, name: str) -> AbstractContextManager[None]:
    """Context manager: loads what is offloaded of the tensors that an adapter's file can have.

    References to tensors that are taken inside the block keep their data.

    Args:
        manager: manager of the model.
        name: name of the adapter.
    """
    return all_onloaded(_offloaded(manager, name))


def _offloaded(manager: AdapterManager, name: str) -> Iterator[nn.Module]:
    """Yields the modules with tensors of the adapter that may be offloaded: its parts, copies and biases."""
    for layer in manager.layers.values():
        if name in layer.adapters._modules:
            yield from layer.offloaded_parts()
    for copied in manager.copies.values():
        if name in copied.modules_to_save:
            yield from copied.modules_to_save[name].modules()
    owners = {key.rpartition(".")[0] for key in manager.base_biases(name)}
    yield from (module for path, module in bare_modules(manager.model) if path in owners)
