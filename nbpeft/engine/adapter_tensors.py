"""The tensors of one adapter, wherever they hang in a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.adapter import AdapterConfig, AdapterWeights, SharedState
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.parameter_layer import AdaptedParameter

Layers = Mapping[str, AdaptedLayer]
Copies = Mapping[str, ModulesToSaveWrapper]
Slot = tuple[dict[str, nn.Parameter | None], str]
"""Parameters of a module, and a key of them."""


def parameter_slots(layers: Layers, copies: Copies, name: str) -> list[Slot]:
    """Returns where the trained tensors of an adapter hang, those of copied modules last."""
    found: dict[int, Slot] = {}
    for owner, frozen in _owners(layers, copies, name):
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_floating_point() and key not in frozen:
                found.setdefault(id(parameter), (owner._parameters, key))  # copies of tied modules share theirs
    return list(found.values())


def is_half(layers: Layers, name: str) -> bool:
    """Whether what an adapter trains in its layers is in half precision, with what they share and without copies."""
    found = [parameters[key] for parameters, key in parameter_slots(layers, {}, name)]
    dtypes = {parameter.dtype for parameter in found if parameter is not None}
    return bool(dtypes) and dtypes.isdisjoint({torch.float32, torch.float64})


def _owners(layers: Layers, copies: Copies, name: str) -> Iterator[tuple[nn.Module, Collection[str]]]:
    """Yields what has parameters of an adapter, and the names of those there that are never trained."""
    for layer in layers.values():
        adapter: Any = layer.adapters._modules.get(name)
        if adapter is not None and not adapter._modules:
            yield adapter, adapter.frozen_parameters
        elif adapter is not None:
            frozen = [key.rpartition(".") for key in adapter.frozen_parameters]
            for path, owner in adapter.named_modules():
                yield owner, [key for place, _, key in frozen if place == path]
    for copied in copies.values():
        trained = copied.modules_to_save._modules.get(name)
        if trained is not None:
            yield from ((owner, ()) for owner in trained.modules())


def saved_weights(layers: Layers, copies: Copies, name: str, config: AdapterConfig) -> AdapterWeights:
    """Returns references to the tensors that a file of an adapter holds, but for those of the base."""
    weights = AdapterWeights()
    for path, layer in layers.items():
        if name in layer.adapters._modules:
            weights.adapters[path] = _saved_tensors(path, layer, name, config)
            start = layer.adapter(name).taken_over
            if start is not None:
                weights.starts[path] = start
    weights.parameters = parameter_paths(layers)
    for path, module in copies.items():
        if name in module.modules_to_save._modules:
            weights.copies[path] = dict(module.modules_to_save[name].state_dict(keep_vars=True))
    shared = shared_state_of(layers, name)
    weights.shared = {} if shared is None else shared.saved_tensors()
    return weights


def parameter_paths(layers: Layers) -> tuple[str, ...]:
    """Returns those of the paths that are parameters of modules, those of one module in its own order."""
    return tuple(path for path, layer in layers.items() if isinstance(layer, AdaptedParameter))


def _saved_tensors(path: str, layer: AdaptedLayer, name: str, config: AdapterConfig) -> dict[str, Tensor]:
    adapter = layer.adapter(name)
    return adapter.saved_tensors(lambda: type(adapter).parameter_shapes(config, path, layer.base.module, layer.kind))


def shared_state_of(layers: Layers, name: str) -> SharedState | None:
    """Returns what the layers of an adapter share, where its method has that."""
    for layer in layers.values():
        adapter = layer.adapters._modules.get(name)
        held = None if adapter is None else adapter._modules.get("shared")
        if isinstance(held, SharedState):
            return held
    return None


@torch.inference_mode(False)
@torch.no_grad()
def copied_weights(weights: AdapterWeights, device: str | None = None) -> AdapterWeights:
    """Returns copies of tensors, without history; those of the base are left out, and what layers share stays one.

    Args:
        weights: of an adapter.
        device: where to; None: each stays where it is.
    """
    return AdapterWeights(
        _copied_once(weights.adapters, device),
        {path: copied(named, device) for path, named in weights.copies.items()},
        shared=copied(weights.shared, device),
        parameters=weights.parameters,
        starts={
            path: replace(start, down=_copied(start.down, device), neg_up=_copied(start.neg_up, device))
            for path, start in weights.starts.items()
        },
    )


def _copied_once(adapters: Mapping[str, Mapping[str, Tensor]], device: str | None) -> dict[str, dict[str, Tensor]]:
    tensors = {id(value): value for named in adapters.values() for value in named.values()}
    copies = {key: _copied(value, device) for key, value in tensors.items()}
    return {path: {key: copies[id(value)] for key, value in named.items()} for path, named in adapters.items()}


def copied(tensors: Mapping[str, Tensor], device: str | None = None) -> dict[str, Tensor]:
    """Returns copies of tensors; see ``copied_weights``."""
    return {key: _copied(value, device) for key, value in tensors.items()}


def _copied(tensor: Tensor, device: str | None) -> Tensor:
    return tensor.detach().to(device or tensor.device, copy=True)
