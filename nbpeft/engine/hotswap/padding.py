"""Prepares slots for adapters of another size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import Adapter, Paddable, Rescales, keep_settings, source_of
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import HotSwapError


class Layers(Protocol):
    """The parts of the adapters' manager that padding uses."""

    @property
    def layers(self) -> dict[str, AdaptedLayer]: ...

    def transaction(self) -> AbstractContextManager[Transaction]: ...


def prepare_for_hotswap(manager: Layers, target_rank: int | None) -> None:
    """Prepares every adapter for swaps that change rank and scaling without recompiling the model.

    Tensors are padded with zeros to ``target_rank``, which changes no output, and scalings become
    tensors. Parameters stay the same objects. Call it before the model is compiled.

    Args:
        manager: the model's manager.
        target_rank: largest rank of the adapters that will be swapped in; None leaves the tensors unchanged.

    Raises:
        HotSwapError: there is no adapter, or an adapter has a larger rank than ``target_rank``, or has no data.
        ConfigError: a grouped convolution does not support the rank.
    """
    slots = [
        (path, layer, adapter)
        for path, layer in manager.layers.items()
        for adapter in layer.adapters._modules.values()
        if isinstance(adapter, Adapter)
    ]
    pads = [(path, adapter) for path, _, adapter in slots if isinstance(adapter, Paddable)]
    tied = next((path for path, adapter in pads if source_of(adapter) is not None), None)
    if tied is not None:
        raise HotSwapError(f"{tied} uses the tensors of another layer (ensure_weight_tying): it cannot be swapped")
    if not slots:
        raise HotSwapError("No adapter layers found on the model: load an adapter before preparing for hot-swapping")
    check_data(parameter for _, _, adapter in slots for parameter in adapter.parameters())
    grown: list[tuple[nn.Parameter, Tensor]] = []
    padded: list[Paddable] = []
    for path, layer, adapter in slots:
        if target_rank is None or not isinstance(adapter, Paddable):
            continue
        if adapter.room > target_rank:
            raise HotSwapError(
                f"{path} has rank {adapter.room}, more than target_rank={target_rank}; pass the largest rank of "
                "all adapters",
                path=path,
                rank=adapter.room,
            )
        if adapter.room < target_rank:
            grown.extend(adapter.enlarged(target_rank, layer.base))
            padded.append(adapter)
    with manager.transaction() as change, torch.no_grad():
        change.keep_data(parameter for parameter, _ in grown)
        for _, _, adapter in slots:
            keep_settings(adapter, change)
        put_larger(grown)
        for wide in padded:
            wide.mark_padded()
        for _, _, adapter in slots:
            if isinstance(adapter, Rescales):
                adapter.store_scaling_as_tensor(next(adapter.parameters()).device)


def check_data(tensors: Iterable[Tensor]) -> None:
    """Refuses tensors without data, because what is written to them is lost.

    Args:
        tensors: tensors of adapters on the model.

    Raises:
        HotSwapError: one is on the meta device.
    """
    if any(tensor.is_meta for tensor in tensors):
        raise HotSwapError(
            "the adapter on the model has no data (meta device), because it is offloaded or was added with "
            "low_cpu_mem_usage: replace it with load_adapter instead"
        )


def put_larger(grown: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Assigns larger tensors to parameters, which stay the same objects: optimizers and compiled code refer to them."""
    for parameter, larger in grown:
        parameter.data = larger
        parameter.grad = None
