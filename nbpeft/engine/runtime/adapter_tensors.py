"""The tensors of one adapter, wherever they are in a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, Paddable, SharedState, WeightInitialized
from nbpeft.engine.contract.base import Shape, Shapes
from nbpeft.engine.kernels.storage import is_packed
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter

Layers = Mapping[str, AdaptedLayer]
Copies = Mapping[str, ModulesToSaveWrapper]
Slot = tuple[dict[str, nn.Parameter | None], str]
"""A module's dictionary of parameters, and a key in it."""


def parameter_slots(layers: Layers, copies: Copies, name: str) -> list[Slot]:
    """Returns the slots of an adapter's trained tensors, those of ``modules_to_save`` last.

    Args:
        layers: path -> adapted layer.
        copies: path -> module with trained copies.
        name: the adapter.
    """
    slots: dict[int, Slot] = {}
    for owner, frozen in _owners(layers, copies, name):
        for key, parameter in owner._parameters.items():
            if parameter is None or key in frozen:
                continue
            if parameter.is_floating_point() and not is_packed(parameter):
                # Keyed by id, because copies of tied modules share their parameters.
                slots.setdefault(id(parameter), (owner._parameters, key))
    return list(slots.values())


def is_half(layers: Layers, name: str) -> bool:
    """Whether all parameters that an adapter trains in its layers are in half precision.

    The state that its layers share counts; ``modules_to_save`` do not.
    """
    trained = [parameters[key] for parameters, key in parameter_slots(layers, {}, name)]
    dtypes = {parameter.dtype for parameter in trained if parameter is not None}
    return bool(dtypes) and dtypes.isdisjoint({torch.float32, torch.float64})


def is_training(layers: Layers, name: str) -> bool | None:
    """Returns whether an adapter is in training mode, which may differ from its layer's; None if no layer has it."""
    here = (layer.adapters._modules.get(name) for layer in layers.values())
    return next((adapter.training for adapter in here if adapter is not None), None)


def _owners(layers: Layers, copies: Copies, name: str) -> Iterator[tuple[nn.Module, Collection[str]]]:
    """Yields the modules with parameters of an adapter, and the names of their parameters that are never trained."""
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
    """Returns references to the tensors in an adapter's file, without those that belong to the base model.

    Args:
        layers: path -> adapted layer.
        copies: path -> module with trained copies.
        name: the adapter.
        config: the adapter's config, which determines the shapes without padding.
    """
    shapes = {path: _shapes(path, layer, name, config) for path, layer in layers.items() if name in layer.adapters}
    return _weights(layers, copies, name, shapes)()


def weights_source(layers: Layers, copies: Copies, name: str, config: AdapterConfig) -> Callable[[], AdapterWeights]:
    """Returns a function that returns ``saved_weights`` at the time of its call.

    The function references the adapter's modules, but not the base model.

    Args:
        layers: path -> adapted layer.
        copies: path -> module with trained copies.
        name: the adapter.
        config: the adapter's config.
    """
    shapes = {
        # Only padded adapters need their shapes, which are computed now because that needs the layer.
        path: _shapes(path, layer, name, config)() if isinstance(layer.adapter(name), Paddable) else {}
        for path, layer in layers.items()
        if name in layer.adapters
    }
    return _weights(layers, copies, name, {path: functools.partial(dict, own) for path, own in shapes.items()})


def _weights(
    layers: Layers, copies: Copies, name: str, shapes: Mapping[str, Callable[[], Mapping[str, Shape]]]
) -> Callable[[], AdapterWeights]:
    adapters = {path: layers[path].adapter(name) for path in shapes}
    copied = {path: module.modules_to_save[name] for path, module in copies.items() if name in module.modules_to_save}
    parameters, shared = parameter_paths(layers), shared_state_of(layers, name)

    def weights() -> AdapterWeights:
        return AdapterWeights(
            {path: adapter.saved_tensors(shapes[path]) for path, adapter in adapters.items()},
            {path: dict(module.state_dict(keep_vars=True)) for path, module in copied.items()},
            shared={} if shared is None else shared.saved_tensors(),
            parameters=parameters,
            starts={
                path: start
                for path, adapter in adapters.items()
                if isinstance(adapter, WeightInitialized) and (start := adapter.taken_over) is not None
            },
        )

    return weights


def parameter_paths(layers: Layers) -> tuple[str, ...]:
    """Returns the paths of adapted bare parameters; those of one module are in the module's order."""
    return tuple(path for path, layer in layers.items() if isinstance(layer, AdaptedParameter))


def _shapes(path: str, layer: AdaptedLayer, name: str, config: AdapterConfig) -> Callable[[], Shapes]:
    """Returns a function that computes the shapes of an adapter's parameters without padding."""
    adapter = layer.adapter(name)
    return lambda: type(adapter).parameter_shapes(config, path, layer.base.module, layer.kind)


def flattened(layers: Layers, name: str, config: AdapterConfig, tensors: Mapping[str, Mapping[str, Tensor]]) -> Shapes:
    """Tensors that lost dimensions or all numbers, as shards of a sharded model do.

    Args:
        layers: path -> adapted layer.
        name: the adapter.
        config: the adapter's config.
        tensors: path -> name -> tensor of the adapter.

    Returns:
        Path and name of each of these tensors -> its shape.
    """
    found = {}
    for path, own in tensors.items():
        shapes = {key: tuple(getattr(tensor, "ds_shape", tensor.shape)) for key, tensor in own.items()}
        suspects = {key: shape for key, shape in shapes.items() if len(shape) < 2 or 0 in shape}
        wanted = _shapes(path, layers[path], name, config)() if suspects else {}
        for key, shape in suspects.items():
            whole = wanted.get(key, shape)
            if len(shape) < len(whole) or (0 in shape and 0 not in whole):
                found[f"{path}.{key}"] = shape
    return found


def shared_state_of(layers: Layers, name: str) -> SharedState | None:
    """Returns the state that an adapter's layers share; None if its method has no such state.

    Args:
        layers: path -> adapted layer.
        name: the adapter.
    """
    for layer in layers.values():
        adapter = layer.adapters._modules.get(name)
        state = None if adapter is None else adapter._modules.get("shared")
        if isinstance(state, SharedState):
            return state
    return None
