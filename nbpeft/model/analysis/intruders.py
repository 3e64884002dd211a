"""Intruder dimensions: strong directions of an adapted weight that the weight did not have before.

LoRA tends to add singular directions that are unlike all of the pre-trained ones; full fine-tuning does not, and
forgets less. They can be counted, and taken back in part at the cost of some of what was learned.

Reference: https://arxiv.org/abs/2410.21228
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, few

TOP, LARGEST_COSINE = 10, 0.5
"""How many of the strongest directions are looked at, and how unlike all others an intruder is: PEFT's defaults."""

_Factors = tuple[Tensor, Tensor, Tensor]
"""U (out, n), values (n,), V (n, in)."""


@torch.no_grad()
def count_intruders(
    layer: AdaptedLayer, name: str, top_k: int = TOP, threshold: float = LARGEST_COSINE, *, scale: float = 1.0
) -> int | None:
    """How many of the strongest directions of an adapted weight the frozen one lacks; None where there is no matrix.

    Costs two singular value decompositions of the weight.

    Args:
        layer: not merged.
        name: of an adapter on it, of any method.
        top_k: directions looked at.
        threshold: an intruder's cosine with each direction of the frozen weight is below.
        scale: factor on what the adapter adds.
    """
    weight = layer.base.weight()
    if weight.ndim != 2:
        return None
    adapted = weight.float() + scale * layer.adapter(name).delta_weight(weight, layer.base).float()
    return len(_intruders(weight.float(), adapted, top_k, threshold)[0])


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
    """Makes an adapter like another, without a part of its intruder dimensions, and activates it.

    What the model knew before comes back in part. Where a layer has no intruder the new adapter is a copy. Two or
    three singular value decompositions of each weight are computed, in float32.

    Args:
        peft_model: with a LoRA adapter that is not merged.
        old_adapter_name: that adapter, which stays as it is.
        new_adapter_name: the one to come.
        top_k: how many of the strongest directions of each adapted weight are looked at.
        threshold_epsilon: an intruder's cosine with each direction of the frozen weight is below. The lower, the fewer.
        mitigation_lambda: as which share of itself an intruder stays in the weight: the lower, the more is taken back.
        logging_sink: called with a line for each layer; None for nothing.

    Raises:
        AdapterError: the adapter is none of LoRA's, a layer is no matrix, or the new name is taken. Nothing is changed.
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
    """Path -> layer of a LoRA adapter on matrices.

    Raises:
        AdapterError: it is none, or a layer has more than a matrix.
    """
    if not isinstance(manager.configs[name], LoraConfig):
        raise AdapterError("The provided model is not using LoRA and is therefore not supported.")
    held = {path: layer for path, layer in manager.layers.items() if name in layer.adapters._modules}
    layers = {path: one for path, one in held.items() if isinstance(one.adapter(name), LowRankAdapter)}
    tied = next((path for path, one in layers.items() if one.adapter(name).source is not None), None)
    if tied is not None:
        raise AdapterError(
            f"adapter {name!r} has one pair of factors on {tied} and the embedding (ensure_weight_tying), whose "
            "intruder dimensions differ"
        )
    other = [path for path, one in layers.items() if one.base.weight().ndim != 2]
    if other:
        raise AdapterError(f"{few(other)}: the weight is no matrix, so it has no directions to compare")
    return layers


def _reduced(
    layer: AdaptedLayer, name: str, top_k: int, threshold: float, share: float
) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """How many intruders an adapted weight has, and A and B of an adapter that has less of them; None for none."""
    adapter: Any = layer.adapter(name)
    first, second = (factor.detach().float() for factor in adapter.trained_factors)
    scaling = float(adapter.scaling)
    weight = layer.base.weight().float()
    if adapter.initial is not None:  # the part of the weight that the adapter started in is the adapter's
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
    """Places of the intruders among the directions of an adapted weight, and its decomposition."""
    known = torch.linalg.svd(weight, full_matrices=False)[0]
    left, values, right = torch.linalg.svd(adapted, full_matrices=False)
    likeness = (left[:, :top_k].T @ known).abs().amax(1)
    return torch.nonzero(likeness < threshold).flatten(), (left, values, right)
