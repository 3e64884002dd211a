"""Files of adapters whose init changes the base weights, for a base without that change.

In PEFT the init of such an adapter (PiSSA, OLoRA, CorDA, LoRA-GA) subtracts its initial component from the base
weights, and ``unload()`` returns the rest of the base, its residual. Here the adapter subtracts it in its forward and
the base weights do not change. If the config is set to ``init_lora_weights = True`` before saving, the file is for the
residual, as in PEFT:

    adapter's config          file, and the base that it fits
    unchanged                 includes the init; the original base
    set to True by the user   only the factors; the residual, which ``unload()`` returns from then on

The second file names the init in its metadata, so that it can be loaded on the original base too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from nbpeft import checkpoint
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, InitialComponent, WeightInitialized
from nbpeft.engine.runtime.manager import AdapterManager

START = "nbpeft.start"
"""Metadata key with the init of the adapter."""


def starting(manager: AdapterManager, name: str) -> list[WeightInitialized]:
    """Returns an adapter's modules on the layers where its init takes over a part of the weight.

    Args:
        manager: manager of the model.
        name: name of the adapter.
    """
    adapters = [layer.adapter(name) for layer in manager.layers_with(name).values()]
    return [
        adapter for adapter in adapters if isinstance(adapter, WeightInitialized) and adapter.taken_over is not None
    ]


def left_start(manager: AdapterManager, name: str) -> dict[str, str]:
    """Returns the metadata of a file for the residual; empty if the adapter's file is for the original base.

    Args:
        manager: manager of the model.
        name: name of the adapter.
    """
    if manager.configs[name].initialised_from_weight:
        return {}
    inits = dict.fromkeys(start.init for one in starting(manager, name) if (start := one.taken_over) is not None)
    return {START: next(iter(inits))} if inits else {}


@torch.no_grad()
def take_out_of_saved(manager: AdapterManager, name: str, weights: AdapterWeights) -> None:
    """Subtracts an adapter's initial component from the base weights in its file, such as embeddings.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        weights: the tensors to save, changed in place.
    """
    for path in weights.starts:
        layer, key = manager.layers[path], f"{path}.weight"
        adapter = layer.adapter(name)
        if key in weights.base and isinstance(adapter, WeightInitialized):
            weights.base[key] = weights.base[key].detach().clone()
            adapter.take_out_(layer.kind.canonical(layer.weight_module, weights.base[key]))


def mark_left(manager: AdapterManager, name: str) -> None:
    """Records that a file for the residual was written or read, so that ``unload()`` returns the residual.

    Args:
        manager: manager of the model.
        name: name of the adapter.
    """
    for adapter in starting(manager, name):
        adapter.leaves_start = True


def kept_start(
    manager: AdapterManager, name: str, config: AdapterConfig, saved: checkpoint.Checkpoint, weights: AdapterWeights
) -> dict[str, InitialComponent]:
    """Returns the initial components of an adapter that a loaded file for the residual continues.

    Args:
        manager: manager of the model.
        name: name of the adapter on the model that the file replaces. As in PEFT its initial components are preserved
            if the file is for the residual.
        config: config of the file.
        saved: the file.
        weights: the file's tensors, by layer.

    Returns:
        Path -> initial component; empty if the file is for another base.
    """
    if name not in manager.configs or config.initialised_from_weight:
        return {}
    starts, own = manager.weights(name).starts, manager.configs[name]
    if not starts or weights.adapters.keys() != manager.weights(name).adapters.keys():
        return {}
    if type(own) is not type(config) or not own.has_scale_of(config, weights.adapters):
        return {}
    if START in saved.metadata:
        return starts
    if not saved.metadata and all(adapter.leaves_start for adapter in starting(manager, name)):
        return starts  # a pickle has no metadata
    if checkpoint.Fingerprint.from_metadata(saved.metadata) is not None:
        return {}  # written by nbpeft, so the metadata would name the init
    return starts if all(start.is_start_of(weights.adapters[path]) for path, start in starts.items()) else {}


def config_on(model: nn.Module, config: AdapterConfig, metadata: Mapping[str, str]) -> AdapterConfig:
    """Returns the config of a file on a base; for a file for the residual on the original base, with its init.

    Args:
        model: the base model.
        config: config of the file.
        metadata: metadata of the file.
    """
    init = metadata.get(START)
    if init is None or config.initialised_from_weight or not checkpoint.is_same_base(metadata, model):
        return config
    found = config.started_as(init)
    if found is None:
        warnings.warn(
            f"the adapter was saved for a base model changed by its init ({init:.40}), and this is the original one: "
            "load it on the base model that unload() returned",
            stacklevel=5,
        )
    return found or config
