"""Repeats layers of a transformer, each time with separate adapters (``layer_replication``).

The map ``[[0, 4], [2, 5]]`` makes seven layers out of five: 0 1 2 3 2 3 4. Repeated layers are separate modules that
share the tensors of the original, so they take no memory. Merging an adapter gives the layer a separate weight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import ConfigError, TargetError

LayerMap = Sequence[Sequence[int]]

_FIELD = "layer_replication"
_RECORD = "_nbpeft_replication"
"""Attribute of the replicated layer list with its ``Replication``, until the replication becomes permanent."""
_INSIDE = ("model", "bert", "transformer")
"""Names of the submodule with the layers, by architecture."""
_LISTS = (("layers",), ("encoder", "layer"), ("h",))
"""Path of the layer list in that submodule: Llama and Mistral, BERT, Falcon."""
_PER_LAYER = "layer_types"


@dataclass
class Replication:
    """State of a model before its layers were replicated.

    Attributes:
        layers: the original layers.
        layer_map: the [start, end) pairs.
        order: for each replicated layer the index of the original.
        settings: original values of attributes of the model's config.
    """

    layers: nn.ModuleList
    layer_map: list[tuple[int, int]]
    order: list[int]
    settings: dict[str, Any]


def pending_replication(model: nn.Module, config: Any) -> list[tuple[int, int]] | None:
    """Checks whether a config requires layers to be replicated that are not replicated yet.

    Args:
        model: the base model.
        config: config of an adapter.

    Returns:
        The map, as [start, end) pairs; None if there is nothing to do.

    Raises:
        ConfigError: the layers are replicated with another map, or the map does not fit the model.
        TargetError: the model has no known layer list, or the layers have adapters already.
    """
    layer_map = _checked(getattr(config, _FIELD, None))
    there = _record(model) if layer_map else None
    if there is not None and layer_map != there.layer_map:
        raise ConfigError(
            f"the layers of the model are replicated as {there.layer_map} for its adapters; delete them before using "
            f"another {_FIELD}",
            field=_FIELD,
        )
    if not layer_map or there is not None:
        return None
    path = _path_of_layers(model)
    layers = model.get_submodule(path)
    count = len(list(layers.children()))
    if any(start < 0 or end > count or start > end for start, end in layer_map):
        raise ConfigError(f"{_FIELD} is {layer_map}, but {path} has the layers 0 to {count - 1}", field=_FIELD)
    if getattr(config, "bias", "none") != "none":
        raise ConfigError(f"{_FIELD} repeats biases, which bias={config.bias!r} cannot train separately", field=_FIELD)
    if any(isinstance(module, Wrapper) for module in layers.modules()):
        raise TargetError(f"{path} already has adapters; add the adapter with {_FIELD} first")
    return layer_map


def _checked(value: Any) -> list[tuple[int, int]]:
    pairs = [] if value is None else [tuple(pair) for pair in value]
    if not all(len(pair) == 2 and all(type(index) is int for index in pair) for pair in pairs):
        raise ConfigError(f"{_FIELD} must be pairs of whole numbers, [start, end), not {value!r:.80}", field=_FIELD)
    return [(start, end) for start, end in pairs]


def _path_of_layers(model: nn.Module) -> str:
    module, path = model, ""
    while (name := next((name for name in _INSIDE if isinstance(module._modules.get(name), nn.Module)), "")) != "":
        module, path = module._modules[name], f"{path}{name}."  # type: ignore[assignment]
    for names in _LISTS:
        found: Any = module
        for name in names:
            found = getattr(found, "_modules", {}).get(name)
        if isinstance(found, nn.ModuleList):
            return path + ".".join(names)
    raise TargetError(
        f"Could not locate the layers attribute in the model, a {type(model).__name__}: {_FIELD} expects Llama, Bert "
        "or Falcon compatible architectures"
    )


def _record(model: nn.Module) -> Replication | None:
    try:
        record: Replication | None = model.get_submodule(_path_of_layers(model)).__dict__.get(_RECORD)
    except TargetError:
        return None
    return record


def _replicas(layers: nn.ModuleList, order: Sequence[int]) -> nn.ModuleList:
    """New modules that share the tensors and the config of the layers they repeat."""
    replicas = []
    for place, index in enumerate(order):
        layer = layers[index]
        shared = [*layer.parameters(), *layer.buffers()]
        shared += [own for module in layer.modules() if (own := module.__dict__.get("config")) is not None]
        replica = copy.deepcopy(layer, {id(thing): thing for thing in shared})  # objects in the memo are not copied
        part: Any
        for part in replica.modules():
            if hasattr(part, "layer_idx"):  # transformers' attention finds its entry in the cache by this index
                part.layer_idx = place
        replicas.append(replica)
    return nn.ModuleList(replicas)


def _order(layer_map: LayerMap) -> list[int]:
    return [index for start, end in layer_map for index in range(start, end)]


def replicated(model: nn.Module, layer_map: LayerMap) -> nn.Module:
    """A shallow copy of a model with replicated layers, for planning.

    Args:
        model: the original, which is not changed.
        layer_map: result of ``pending_replication``.

    Returns:
        The copy.
    """
    layers = model.get_submodule(_path_of_layers(model))
    assert isinstance(layers, nn.ModuleList)
    return _with_layers(model, _replicas(layers, _order(layer_map)))


def before_replication(model: nn.Module) -> nn.Module:
    """The model as it was before its layers were replicated.

    Args:
        model: the base model.

    Returns:
        A shallow copy with the original layers; the model itself if no layers are replicated.
    """
    record = _record(model)
    return model if record is None else _with_layers(model, record.layers)


def _with_layers(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    root = parent = _shallow(model)
    *names, attribute = _path_of_layers(model).split(".")
    for name in names:
        child = parent._modules[name]
        assert child is not None
        parent._modules[name] = child = _shallow(child)
        parent = child
    parent._modules[attribute] = layers
    return root


def _shallow(module: nn.Module) -> nn.Module:
    # ``copy.copy`` would call ``__setstate__``, in which some modules build their parts again.
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return twin


def replicate_layers_(model: nn.Module, layer_map: LayerMap, change: Transaction) -> None:
    """Replaces the list of a model's layers.

    Args:
        model: the base model.
        layer_map: result of ``pending_replication``.
        change: records what is changed.
    """
    owner_path, _, attribute = _path_of_layers(model).rpartition(".")
    owner = model.get_submodule(owner_path)
    layers, order = owner._modules[attribute], _order(layer_map)
    assert isinstance(layers, nn.ModuleList)
    replicas = _replicas(layers, order)
    config: Any = getattr(model, "config", None)
    settings = {name: value for name in ("num_hidden_layers", _PER_LAYER) if (value := getattr(config, name, None))}
    replicas.__dict__[_RECORD] = Replication(layers, [(start, end) for start, end in layer_map], order, settings)
    replicas.train(layers.training)
    change.set_item(owner._modules, attribute, replicas)
    if settings:
        change.keep_attributes(config, *settings)
    if "num_hidden_layers" in settings:
        config.num_hidden_layers = len(order)
    if len(settings.get(_PER_LAYER, ())) == len(layers):
        setattr(config, _PER_LAYER, [settings[_PER_LAYER][index] for index in order])


def undo_replication(model: nn.Module, change: Transaction, *, keep: bool) -> None:
    """Undoes the replication of layers when no adapter needs it any more.

    Args:
        model: the base model.
        change: records what is changed.
        keep: leave them replicated permanently, because adapters were merged into them.
    """
    record = _record(model)
    if record is None:
        return
    owner_path, _, attribute = _path_of_layers(model).rpartition(".")
    owner = model.get_submodule(owner_path)
    replicas = owner._modules[attribute]
    assert isinstance(replicas, nn.ModuleList)
    if keep:
        change.keep_attributes(replicas, _RECORD)
        del replicas.__dict__[_RECORD]
        return
    for replica, index in zip(replicas, record.order, strict=True):
        for source, module in zip(replica.modules(), record.layers[index].modules(), strict=True):
            module._parameters.update(source._parameters)  # to() may have replaced them since the replication
            module._buffers.update(source._buffers)
            module.training = source.training
    change.set_item(owner._modules, attribute, record.layers)
    config: Any = getattr(model, "config", None)
    if record.settings:
        change.keep_attributes(config, *record.settings)
    for name, value in record.settings.items():
        setattr(config, name, value)
