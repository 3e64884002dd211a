"""How much an adapter changes each layer of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.contract.adapter import Adapter, MeasuresDelta, norm_of_delta
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import AdapterError
from nbpeft.model.analysis.intruders import count_intruders
from nbpeft.model.from_data.observing import progress
from nbpeft.state import LayerChange


@torch.no_grad()
def inspect_adapter(manager: AdapterManager, name: str, *, intruders: bool = False) -> tuple[LayerChange, ...]:
    """Measures how much an adapter changes the weight of each layer, in Frobenius norms.

    The adapter's current scale is included. Modules trained as a whole (``modules_to_save``) are compared with the
    frozen originals. Nothing is changed, and the delta of a low-rank adapter is not materialized.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        intruders: also count intruder dimensions, which needs two singular value decompositions of each weight.

    Returns:
        One record per layer or module, in the manager's order.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: adapters are merged, so that the frozen weights are not available.
    """
    manager.require_available(name)
    with manager.ensure_loaded([name]):
        manager.require(name)
        manager.refuse_merged("inspecting")
        found = (*_layers(manager, name), *_copies(manager, name))
        return _with_intruders(manager, name, found) if intruders else found


def _layers(manager: AdapterManager, name: str) -> Iterator[LayerChange]:
    scale = abs(manager.scale(name))
    for path, layer in manager.layers_with(name).items():
        weight = layer.base.weight()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in layer.adapter(name).parameters()):
            raise AdapterError(f"adapter {name!r} has non-finite parameters at {path}", path=path)
        norm, directions = _size_of_delta(layer.adapter(name), weight, layer.base)
        size = float(torch.linalg.vector_norm(weight, dtype=_wide(weight)))
        yield LayerChange(path, scale * norm, size, directions, layer.adapter(name).delta_rank)


def _size_of_delta(adapter: Adapter, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
    if isinstance(adapter, MeasuresDelta):
        return adapter.delta_size(weight, base)
    return norm_of_delta(adapter, weight, base), None


def _with_intruders(manager: AdapterManager, name: str, found: tuple[LayerChange, ...]) -> tuple[LayerChange, ...]:
    counted = []
    with progress(len(found), "weights decomposed", show=True) as report:
        for number, change in enumerate(found):
            check_interrupt()
            report(number)
            layer = manager.layers.get(change.path)
            scale = manager.scale(name)
            count = None if layer is None or change.rank is None else count_intruders(layer, name, scale=scale)
            counted.append(replace(change, intruders=count))
    return tuple(counted)


def _copies(manager: AdapterManager, name: str) -> Iterator[LayerChange]:
    for path, module in manager.copies.items():
        copied = module.modules_to_save._modules.get(name)
        if copied is not None:
            yield LayerChange(path, *_distance(copied, module.original_module), None, None)


def _distance(copied: nn.Module, original: nn.Module) -> tuple[float, float]:
    changed = frozen = 0.0
    before = dict(original.named_parameters())
    for path, parameter in copied.named_parameters():
        plain = before[path].to(_wide(parameter))
        frozen += float(plain.square().sum())
        changed += float((parameter.to(plain.dtype) - plain).square().sum())
    return changed**0.5, frozen**0.5


def _wide(tensor: Tensor) -> torch.dtype:
    """Returns the dtype for sums: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
