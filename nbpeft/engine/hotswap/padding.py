"""Ranks: making room in a slot, and what of it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nbpeft.engine.adapter import Adapter
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.transaction import Transaction
from nbpeft.errors import HotSwapError


class Layers(Protocol):
    """What padding needs of the adapters' manager."""

    layers: dict[str, AdaptedLayer]

    def transaction(self) -> AbstractContextManager[Transaction]: ...  # noqa: D102


def prepare_for_hotswap(manager: Layers, target_rank: int | None = None) -> None:
    """Makes every adapter's slots ready for swaps that change rank and scaling without compiling again.

    Factors are padded with zeros to ``target_rank``, which changes no output, and scalings become
    tensors. Parameters stay the same objects. Call it before the model is compiled.

    Args:
        manager: the model's adapters.
        target_rank: largest rank of the adapters to come; None leaves the factors alone.

    Raises:
        HotSwapError: there is no adapter, or one has a larger rank than ``target_rank``.
        ConfigError: a grouped convolution cannot take that rank.
    """
    slots = [
        (path, layer, adapter)
        for path, layer in manager.layers.items()
        for adapter in layer.adapters._modules.values()
        if isinstance(adapter, Adapter)
    ]
    if not slots:
        raise HotSwapError("the model has no adapter layers: load the first adapter before preparing for hot-swapping")
    grown: list[tuple[nn.Parameter, Tensor]] = []
    padded: list[Adapter] = []
    for path, layer, adapter in slots:
        factors = factor_names(adapter)
        if target_rank is None or not factors:
            continue
        rank = adapter.get_parameter(factors[0]).shape[0]
        if rank > target_rank:
            raise HotSwapError(
                f"{path} has rank {rank}, more than target_rank={target_rank}; pass the largest rank of all adapters",
                path=path,
                rank=rank,
            )
        if rank < target_rank:
            grown.extend(larger_factors(layer, adapter, target_rank))
            padded.append(adapter)
    with manager.transaction() as change, torch.no_grad():
        change.keep_data(parameter for parameter, _ in grown)
        for _, _, adapter in slots:
            change.keep_attributes(adapter, "padded", "scaling")
        put_larger(grown)
        for adapter in padded:
            adapter.__dict__["padded"] = True
        for _, _, adapter in slots:
            scaling = getattr(adapter, "scaling", None)
            if scaling is not None and not isinstance(scaling, Tensor):
                adapter.scaling = torch.tensor(float(scaling), device=next(adapter.parameters()).device)


def adapter_tensors(adapter: Adapter, config: Any, path: str, layer: AdaptedLayer) -> dict[str, Tensor]:
    """The tensors of an adapter, without the zeros that pad its factors.

    They are its parameters; where those are padded, views of them, and a copy of the A of a
    grouped convolution.
    """
    tensors: dict[str, Tensor] = {key: value for key, value in adapter._parameters.items() if value is not None}
    if not adapter.__dict__.get("padded"):
        return tensors
    shapes = type(adapter).parameter_shapes(config, path, layer.base.module, layer.host)
    for key, tensor in tensors.items():
        used, _ = used_part(adapter, key, tensor, shapes[key], layer)
        tensors[key] = used.reshape(shapes[key])
    return tensors


def factor_names(adapter: Adapter) -> tuple[str, ...]:
    """Names of A and B; empty for methods without low-rank factors."""
    names: tuple[str, ...] = getattr(adapter, "factor_names", ())
    return names


def used_part(
    adapter: Adapter, key: str, tensor: Tensor, shape: Sequence[int], layer: AdaptedLayer
) -> tuple[Tensor, list[Tensor]]:
    """Views of the part of a factor that an adapter of some shape uses, and of the rest.

    A grouped convolution's A has one block of rows for each group, and each is padded.
    """
    if tensor.shape == shape:
        return tensor, []
    names = factor_names(adapter)
    if key not in names:
        return tensor, []
    if key == names[1]:
        return tensor[:, : shape[1]], [tensor[:, shape[1] :]]
    groups = getattr(layer.base.module, "groups", 1)
    if groups == 1:
        return tensor[: shape[0]], [tensor[shape[0] :]]
    blocks = tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])
    return blocks[:, : shape[0] // groups], [blocks[:, shape[0] // groups :]]


def larger_factors(layer: AdaptedLayer, adapter: Adapter, rank: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The factors' parameters and their values padded with zeros to a rank."""
    shapes = layer.host.factor_shapes(layer.base.module, rank)
    for key, shape in zip(factor_names(adapter), shapes, strict=True):
        parameter = adapter.get_parameter(key)
        larger = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        used, _ = used_part(adapter, key, larger, tuple(parameter.shape), layer)
        used.copy_(parameter.detach().reshape(used.shape))
        yield parameter, larger


def put_larger(grown: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Gives parameters larger values; they stay the same objects."""
    for parameter, larger in grown:
        parameter.data = larger
        parameter.grad = None
