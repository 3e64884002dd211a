"""Converting adapters of any method to LoRA."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig, AdapterWeights, unconvertible_reason
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.registry import method_of, method_of_adapter
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.kernels.numerics import is_finite
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.nearest import NearestFactors, add_bias, check_rank, nearest_config, nearest_factors
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import manager_of, unwrapped
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConversionError
from nbpeft.model.combine.combining import plan_on
from nbpeft.model.saving import files
from nbpeft.state import LayerLoss

_NOTHING = "Could not detect any layer that supports LoRA conversion"


@dataclass(frozen=True)
class Converted:
    """An adapter converted to LoRA.

    Attributes:
        plan: the injection plan, with the LoRA config.
        weights: the LoRA's tensors; copies of ``modules_to_save`` are the adapter's own tensors.
        layers: the approximation error of each layer, in the model's order.
    """

    plan: InjectionPlan
    weights: AdapterWeights
    layers: tuple[LayerLoss, ...]


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns the best LoRA approximation of an adapter of any method that changes weights.

    The model is not changed. The adapter's current scale is multiplied into the factors, whose scaling is 1.

    Args:
        model: a PeftModel or an adapted base model.
        rank: rank of the LoRA. A float is the minimal share of the squared norm of the change to preserve in each
            layer; each layer then gets the smallest rank that does so.
        adapter_name: name of the adapter.
        progressbar: show a progress bar.
        compile_kwargs: accepted for compatibility with PEFT; nothing is compiled.

    Returns:
        The config, and the tensors under the keys of an adapter file. For a base model without a PeftModel the keys
        lack the prefix ``base_model.model.``, as in ``get_peft_model_state_dict``.

    Raises:
        ConversionError: the model has no such change, or one that a LoRA cannot represent.
        ConfigError: the rank is invalid.
    """
    manager = _manager_with(model, adapter_name, rank)
    with manager.ensure_loaded((adapter_name,)), manager.active_state.hold():
        made = converted(manager, adapter_name, rank, progressbar=progressbar)
    config: Any = made.plan.config
    tensors = checkpoint.to_file(made.weights, peft_type=method_of(config).peft_type)
    if unwrapped(model) is manager.model:
        tensors = {checkpoint.without_prefix(key): tensor for key, tensor in tensors.items()}
    return config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Saves the best LoRA approximation of an adapter; the model is not changed.

    Args:
        path: folder, created if it does not exist.
        model: a PeftModel or an adapted base model.
        rank: see ``convert_to_lora``.
        adapter_name: name of the adapter.
        progressbar: show a progress bar.
        compile_kwargs: accepted for compatibility with PEFT; nothing is compiled.

    Raises:
        ConversionError: the model has no such change, or one that a LoRA cannot represent.
        ConfigError: the rank is invalid.
        CheckpointError: the folder cannot be written; existing files are unchanged.
    """
    manager = _manager_with(model, adapter_name, rank)

    def rewrite(name: str, config: AdapterConfig, weights: AdapterWeights) -> tuple[AdapterConfig, AdapterWeights]:
        made = converted(manager, name, rank, progressbar=progressbar)
        return made.plan.config, AdapterWeights(made.weights.adapters, weights.copies, weights.base)

    with manager.ensure_loaded((adapter_name,)):
        files.save(manager, path, names=[adapter_name], flat=True, rewrite=rewrite, mark_saved=False)


def _manager_with(model: nn.Module, name: str, rank: int | float) -> AdapterManager:
    check_rank(rank)
    manager = manager_of(model)
    if manager is None or not manager.configs:
        raise ConversionError(f"{_NOTHING}: the model carries no adapters")
    manager.require_available(name)
    if isinstance(manager.configs[name], LoraConfig):
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that, "
            "but to lower its rank",
            stacklevel=3,
        )
    return manager


@torch.no_grad()
def converted(manager: AdapterManager, name: str, rank: int | float, *, progressbar: bool = False) -> Converted:
    """Returns the best LoRA approximation of an adapter; see ``convert_to_lora``.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        rank: rank of the LoRA, or the share of the squared norm to preserve.
        progressbar: show a progress bar.
    """
    check_rank(rank)
    config, layers = manager.configs[name], _convertible(manager, name)
    if any(layer.adapter(name).reads_weight for layer in layers.values()):
        manager.refuse_merged("converting an adapter whose update depends on the frozen weights")
    own, scale = manager.weights(name), manager.scale(name)
    tensors = {path: own.adapters[path] for path in own.adapters if path not in layers}
    losses: list[LayerLoss] = []
    biases: dict[str, Tensor] = {}
    for path, layer in _with_bar(layers) if progressbar else layers.items():
        check_interrupt()
        adapter = layer.adapter(name)
        found = _finite(name, path, adapter, layer.base, rank, scale)
        tensors[path] = found.tensors
        losses.append(LayerLoss(path, found.rank, math.sqrt(1 - found.kept), found.kept))
        bias = adapter.delta_bias(layer.base)
        if bias is not None:
            biases[path] = bias.detach() * scale
    ranks = {loss.path: loss.rank or 0 for loss in losses}
    if biases:
        for path, layer in layers.items():
            add_bias(tensors[path], biases.get(path), layer.base)
    nearest = nearest_config(config, rank, ranks, biased=bool(biases))
    checkpoint.set_prompt_format(nearest, checkpoint.prompt_format(config))
    plan = plan_on(manager, nearest, tensors)
    return Converted(plan, AdapterWeights(tensors, own.copies), tuple(losses))


def _convertible(manager: AdapterManager, name: str) -> dict[str, AdaptedLayer]:
    """Returns path -> layer for the layers on which a LoRA replaces the adapter.

    Raises:
        ConversionError: there are none, or a LoRA cannot represent the adapter on one of them.
    """
    config: Any = manager.configs[name]
    if config.learns_prompt:
        raise ConversionError(f"{_NOTHING}: adapter {name!r} learns a prompt and changes no weight")
    if getattr(config, "bias", "none") != "none":
        raise ConversionError(
            f"The adapter's config sets bias={config.bias}, this is not supported: a LoRA would add nothing to the "
            "base's biases"
        )
    found = {}
    for path, layer in manager.layers_with(name).items():
        adapter = layer.adapter(name)
        method = method_of_adapter(adapter)
        if method is not None and method.shares.companion is not None and method is not method_of(config):
            continue  # a LoRA config can request the same companion, so it is copied as it is
        reason = unconvertible_reason(adapter, layer.base)
        if reason:
            raise ConversionError(
                f"Some module types on this model do not support LoRA conversion: {path}: {reason}", path=path
            )
        found[path] = layer
    if not found:
        raise ConversionError(f"{_NOTHING}: adapter {name!r} changes no weight")
    return found


def can_convert(manager: AdapterManager, name: str) -> bool:
    """Returns whether a LoRA can represent an adapter; False for an unknown name."""
    try:
        return name in manager.configs and bool(_convertible(manager, name))
    except ConversionError:
        return False


def _with_bar(layers: dict[str, AdaptedLayer]) -> Any:
    """Yields path and layer with a progress bar, also where bars of downloads are off: the caller asked for it."""
    return importlib.import_module("tqdm").tqdm(layers.items(), desc="Converting to LoRA")


def _finite(name: str, path: str, adapter: Adapter, base: BaseLayer, rank: int | float, scale: float) -> NearestFactors:
    """Returns the closest factors on one layer.

    Raises:
        ConversionError: the adapter has non-finite values.
    """
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        found = nearest_factors(adapter, base, rank, path, scale)
        if math.isfinite(found.kept) and all(is_finite(tensor) for tensor in found.tensors.values()):
            return found
    raise ConversionError(f"adapter {name!r} has non-finite values at {path}", path=path)
