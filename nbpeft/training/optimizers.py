"""Optimizers made for low-rank adapters."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nbpeft.errors import TrainingError
from nbpeft.training.adapted import trainable

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """LoRA+: B learns faster than A (https://arxiv.org/abs/2402.12354). Arguments as in PEFT.

    Args:
        model: The model with adapters.
        optimizer_cls: Which optimizer.
        lr: Learning rate of A and of everything that is neither A nor B.
        loraplus_lr_ratio: Learning rate of B and of vectors, as a multiple of ``lr``; at least 1.
        **kwargs: For the optimizer, and ``loraplus_weight_decay`` (0.0) and
            ``loraplus_lr_embedding`` (1e-6), the learning rate of adapters on embeddings.

    Raises:
        TrainingError: nothing is trainable.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_rate = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    in_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in trainable(model):
        groups[_group(name, parameter, id(parameter) in in_norms)].append(parameter)
    if not any(groups.values()):
        raise TrainingError("Nothing is trainable: unfreeze an adapter before making its optimizer.")
    rates = {
        "A": lr,
        "embedding": embedding_rate,
        "B": lr * loraplus_lr_ratio,
        "B without decay": lr * loraplus_lr_ratio,
    }
    optimizer = optimizer_cls(
        [
            {"params": members, "lr": rates[group], "weight_decay": 0.0 if group == "B without decay" else decay}
            for group, members in groups.items()
        ],
        **{"lr": lr, **kwargs},
    )
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _group(name: str, parameter: nn.Parameter, in_norm: bool) -> str:
    segments = name.split(".")
    if any(segment.startswith("lora_embedding_") for segment in segments):
        return "embedding"
    if any(segment.startswith("lora_B") for segment in segments) or parameter.ndim == 1:
        return "B without decay" if in_norm or "bias" in segments[-1] else "B"
    return "A"


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    optim: Any = importlib.import_module("bitsandbytes.optim")
    manager = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
