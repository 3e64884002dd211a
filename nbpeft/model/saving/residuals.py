"""Files of adapters that start in a part of the base, for a base without that part.

PEFT subtracts what such an adapter (PiSSA, OLoRA, CorDA, LoRA-GA) starts in from the base; ``unload()`` then gives the
rest of the base, its residual. Here the adapter subtracts it and the base stays as it is. Whose config is set to
``init_lora_weights = True`` before it is saved is saved for the residual, as with PEFT:

    adapter's config          file, and the base that it goes with
    as it was made            says where it starts; the base as it was
    set to True by hand       the factors alone; the residual, which ``unload()`` gives from then on

The second file says from what it was started, so that it is right on the base as it was, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from nbpeft import checkpoint
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, StartsInWeight, TakenOver
from nbpeft.engine.runtime.manager import AdapterManager

START = "nbpeft.start"
"""Where a file says which init its adapter started from."""


def starting(manager: AdapterManager, name: str) -> list[StartsInWeight]:
    """Returns what an adapter has on the layers on which it starts in a part of the weight."""
    here = [layer.adapter(name) for layer in manager.layers.values() if name in layer.adapters]
    return [one for one in here if isinstance(one, StartsInWeight) and one.taken_over is not None]


def left_start(manager: AdapterManager, name: str) -> dict[str, str]:
    """Returns what a file for the residual says of an adapter; nothing where its file is for the base as it is."""
    if manager.configs[name].initialised_from_weight:
        return {}
    inits = dict.fromkeys(start.init for one in starting(manager, name) if (start := one.taken_over) is not None)
    return {START: next(iter(inits))} if inits else {}


@torch.no_grad()
def take_out_of_saved(manager: AdapterManager, name: str, weights: AdapterWeights) -> None:
    """Subtracts what an adapter starts in from the weights of the base that its file holds, as embeddings."""
    for path in weights.starts:
        layer, key = manager.layers[path], f"{path}.weight"
        adapter = layer.adapter(name)
        if key in weights.base and isinstance(adapter, StartsInWeight):
            weights.base[key] = weights.base[key].detach().clone()
            adapter.take_out_(layer.kind.canonical(layer.weight_module, weights.base[key]))


def mark_left(manager: AdapterManager, name: str) -> None:
    """Notes that a file for the residual was written or read, so that ``unload()`` gives that."""
    for adapter in starting(manager, name):
        adapter.leaves_start = True


def kept_start(
    manager: AdapterManager, name: str, config: AdapterConfig, saved: checkpoint.Checkpoint, weights: AdapterWeights
) -> dict[str, TakenOver]:
    """Returns where an adapter starts that takes the place of one it was trained from, or of itself.

    Args:
        manager: of the model.
        name: the adapter on the model, which has a start and keeps it as in PEFT, if the file is for the residual.
        config: of the file.
        saved: the file.
        weights: the file's tensors, by layer.
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
    if not saved.metadata and all(one.leaves_start for one in starting(manager, name)):
        return starts  # a pickle cannot say so
    if checkpoint.Fingerprint.from_metadata(saved.metadata) is not None:
        return {}  # it would say so
    return starts if all(start.is_start_of(weights.adapters[path]) for path, start in starts.items()) else {}


def config_on(model: nn.Module, config: AdapterConfig, metadata: Mapping[str, str]) -> AdapterConfig:
    """Returns the config of a file for a base: where that is no residual, one that subtracts what the file leaves out.

    Args:
        model: the base model.
        config: of the file.
        metadata: of the file.
    """
    init = metadata.get(START)
    if init is None or config.initialised_from_weight or not checkpoint.is_same_base(metadata, model):
        return config
    found = config.started_as(init)
    if found is None:
        warnings.warn(
            f"the adapter was saved for a base without what it started from ({init:.40}), and this base has that: load "
            "it on the base that unload() gave",
            stacklevel=5,
        )
    return found or config
