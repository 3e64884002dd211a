"""Intruder dimensions: strong singular directions of an adapted weight that the original weight does not have.

LoRA tends to add singular directions that are unlike all pre-trained ones. Full fine-tuning does not, and forgets less.
Intruders can be counted, and scaled down at the cost of part of what was learned.

Reference: https://arxiv.org/abs/2410.21228
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.contract.adapter import delta_of, source_of
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, few

_TOP, _LARGEST_COSINE = 10, 0.5
"""PEFT's defaults: how many of the strongest directions are examined, and below which cosine one is an intruder."""

_Factors = tuple[Tensor, Tensor, Tensor]
"""The singular value decomposition U (out, n), values (n,), V (n, in)."""


@torch.no_grad()
def count_intruders(layer: AdaptedLayer, name: str, *, scale: float = 1.0) -> int | None:
    """Counts the intruders among the strongest directions of an adapted weight.

    Needs two singular value decompositions of the weight.

    Args:
        layer: a layer that is not merged.
        name: an adapter on it, of any method.
        scale: factor on the adapter's delta.

    Returns:
        The number of intruders; None if the weight is not a matrix.
    """
    weight = layer.base.weight()
    if weight.ndim != 2:
        return None
    adapted = weight.float() + scale * delta_of(layer.adapter(name), weight, layer.base).float()
    return len(_intruders(weight.float(), adapted, _TOP, _LARGEST_COSINE)[0])


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[..., Any] | None = print,
) -> None:
    """Creates and activates a copy of an adapter with smaller intruder dimensions.

    This restores part of what the model knew before. In layers without intruders the new adapter is a plain copy. It
    computes two or three singular value decompositions of each weight, in float32.

    Args:
        peft_model: a model with a LoRA adapter that is not merged.
        old_adapter_name: that adapter, which is not changed.
        new_adapter_name: name of the new adapter.
        top_k: number of strongest directions to examine in each adapted weight.
        threshold_epsilon: a direction is an intruder if its cosine with every direction of the frozen weight is below
            this value. A lower value finds fewer.
        mitigation_lambda: factor on each intruder, from 0 to 1. A lower value removes more of it.
        logging_sink: called with one line per layer; None for no output.

    Raises:
        AdapterError: the adapter is not LoRA, a weight is not a matrix, or the new name is taken. Nothing is changed.
        MergeError: adapters are merged.
    """
    manager = require_manager(peft_model)
    manager.require(old_adapter_name)
    manager.refuse_merged("reducing intruder dimensions")
    layers = _low_rank_layers(manager, old_adapter_name)
    say = logging_sink or (lambda *_: None)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        check_interrupt()  # a large weight takes minutes
        count, factors = _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        say(f"{path}: Intruders: {count}" if count else f"{path}: No intruders")
        if factors is not None:
            found[path] = factors
    with manager.transaction():
        manager.copy(old_adapter_name, new_adapter_name)
        for path, factors in found.items():
            adapter: Any = layers[path].adapter(new_adapter_name)
            for parameter, value in zip(adapter.trained_factors, factors, strict=True):
                parameter.copy_(value)
        say(f"Enabling new adapter {new_adapter_name}")
        manager.activate(new_adapter_name)


def _low_rank_layers(manager: AdapterManager, name: str) -> Mapping[str, AdaptedLayer]:
    """Returns path -> layer for the layers of a LoRA adapter.

    Raises:
        AdapterError: the adapter is not LoRA, shares tied factors, or is on a weight that is not a matrix.
    """
    if not isinstance(manager.configs[name], LoraConfig):
        raise AdapterError("The provided model is not using LoRA and is therefore not supported.")
    adapted = manager.layers_with(name)
    layers = {path: layer for path, layer in adapted.items() if isinstance(layer.adapter(name), LowRankAdapter)}
    tied = next((path for path, layer in layers.items() if source_of(layer.adapter(name)) is not None), None)
    if tied is not None:
        raise AdapterError(
            f"adapter {name!r} has one pair of factors on {tied} and the embedding (ensure_weight_tying), whose "
            "intruder dimensions differ"
        )
    other = [path for path, layer in layers.items() if layer.base.weight().ndim != 2]
    if other:
        raise AdapterError(f"{few(other)}: the weight is not a matrix, so it has no singular vectors to compare")
    return layers


def _reduced(
    layer: AdaptedLayer, name: str, top_k: int, threshold: float, share: float
) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """Returns the number of intruders of an adapted weight, and A and B with smaller intruders (None without any)."""
    adapter: Any = layer.adapter(name)
    first, second = (factor.detach().float() for factor in adapter.trained_factors)
    scaling = float(adapter.scaling)
    weight = layer.base.weight().float()
    if adapter.initial is not None:  # PiSSA-like inits move a part of the weight into the adapter: add it back
        init_A, neg_init_B = adapter.initial
        weight = weight + scaling * (neg_init_B.float() @ init_A.float())
    adapted = weight + scaling * (second @ first)
    places, (left, values, right) = _intruders(weight, adapted, top_k, threshold)
    if not len(places):
        return 0, None
    strong = (left[:, places] * values[places]) @ right[places]
    delta = (adapted + (share - 1) * strong - weight) / scaling
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[: adapter.rank].sqrt()
    return len(places), (root[:, None] * right[: adapter.rank], left[:, : adapter.rank] * root)


def _intruders(weight: Tensor, adapted: Tensor, top_k: int, threshold: float) -> tuple[Tensor, _Factors]:
    """Returns the indices of the intruders among an adapted weight's directions, and the weight's decomposition."""
    known = torch.linalg.svd(weight, full_matrices=False)[0]
    left, values, right = torch.linalg.svd(adapted, full_matrices=False)
    likeness = (left[:, :top_k].T @ known).abs().amax(1)
    return torch.nonzero(likeness < threshold).flatten(), (left, values, right)
