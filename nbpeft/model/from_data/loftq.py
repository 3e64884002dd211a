"""``replace_lora_weights_loftq``: adapters that compensate the quantization error, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft._util.interrupts import check_interrupt, released_interrupts
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import is_quantized_layer
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, BaseMismatchError, CheckpointNotFoundError, few
from nbpeft.model.saving.merge_weights import is_transposed


@dataclass(frozen=True)
class _Place:
    """An adapter on a quantized layer, and the name of the layer's weight in the files."""

    path: str
    layer: AdaptedLayer
    adapter: LowRankAdapter
    key: str


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Sets a LoRA adapter to the best approximation of each layer's quantization error that its rank allows.

    Unlike PEFT's function, this one supports every quantization backend and takes the adapter's scaling into account.
    (PEFT ignores it, and so adds ``lora_alpha / r`` times the error.) Only one full-precision weight is in memory at a
    time.

    Args:
        peft_model: the quantized model with the adapter.
        model_path: folder of the full-precision model in safetensors; by default that the model was loaded from.
        adapter_name: name of the adapter.
        callback: called with the model and the path of each layer after its adapter was set; if it returns False, the
            previous values are restored.

    Raises:
        CheckpointNotFoundError: the folder is not found, or lacks the weight of a layer.
        AdapterError: the adapter is not LoRA, was initialized from the weights, or is not on a quantized layer.
        BaseMismatchError: a weight has another shape. After any error the adapter is unchanged.
    """
    manager = require_manager(peft_model)
    manager.require(adapter_name)
    manager.refuse_merged(f"replacing the weights of {adapter_name!r}")
    layers = _quantized_layers(manager, adapter_name)
    files = checkpoint.ModelFolder(_folder(manager.model, model_path))
    prefix = getattr(manager.model, "base_model_prefix", "")
    places = [_Place(path, layer, adapter, _key(path, files, prefix)) for path, (layer, adapter) in layers.items()]
    with manager.transaction(during_calls=True):
        for place in places:
            check_interrupt()
            with suppress(_Unwanted), manager.transaction(during_calls=True) as change:
                _replace(place, files, change)
                if callback is not None:
                    with released_interrupts():
                        accepted = callback(peft_model, place.path)
                    if not accepted:
                        raise _Unwanted


class _Unwanted(Exception):
    """The callback rejected a layer's new values: makes the transaction restore the previous ones."""


def _quantized_layers(manager: AdapterManager, name: str) -> dict[str, tuple[AdaptedLayer, LowRankAdapter]]:
    found: dict[str, tuple[AdaptedLayer, LowRankAdapter]] = {}
    for path, layer in manager.layers_with(name).items():
        adapter = layer.adapter(name)
        if not is_quantized_layer(layer.base_layer):
            continue
        if not isinstance(adapter, LowRankAdapter) or adapter.computes_factors:
            raise AdapterError(f"adapter {name!r} is {type(adapter).__name__}, not LoRA: LoftQ sets low-rank factors")
        if adapter.initial is not None:
            raise AdapterError(f"the init of adapter {name!r} changed the weights: use init_lora_weights=True")
        found[path] = layer, adapter
    if not found:
        raise AdapterError(f"adapter {name!r} has no quantized layer: load the model in 4 or 8 bits first")
    return found


def _folder(model: nn.Module, model_path: str | os.PathLike[str] | None) -> str:
    name = model_path or getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    try:
        if name:
            return str(checkpoint.local_folder(os.fspath(name).removesuffix("model.safetensors")))
    except CheckpointNotFoundError as error:
        if model_path:
            raise
        raise CheckpointNotFoundError(f"{error}: give model_path, the full-precision model's folder") from None
    raise CheckpointNotFoundError("the source of the model is unknown: give model_path, its folder")


def _key(path: str, files: checkpoint.ModelFolder, prefix: str) -> str:
    names = [f"{path}.weight", f"{path.removeprefix(f'{prefix}.')}.weight", f"{prefix}.{path}.weight"]
    found = next((name for name in names if name in files), None)
    if found is None:
        present = [spec.name for shard in files.shards for spec in shard]
        raise CheckpointNotFoundError(f"{files.folder} has no {names[0]}; it has {few(present, 3)}")
    return found


@torch.no_grad()
def _replace(place: _Place, files: checkpoint.ModelFolder, change: Transaction) -> None:
    base = place.layer.base
    quantized, whole = base.weight(), _read(place, files)
    if whole.shape != quantized.shape:
        raise BaseMismatchError(
            f"{place.key} in {files.folder} is {tuple(whole.shape)}, the layer's is {tuple(quantized.shape)}"
        )
    change.keep_values(list(place.adapter.parameters()))
    place.adapter.approximate_(whole.to(base.device, torch.float32) - quantized.float(), base)


def _read(place: _Place, files: checkpoint.ModelFolder) -> Tensor:
    """Reads the full-precision weight in the canonical layout (out, in)."""
    base, weight = place.layer.base, files.read(place.key)
    return base.kind.canonical(base.module, weight.T if is_transposed(base.module) else weight)
