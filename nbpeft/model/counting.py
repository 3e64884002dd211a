"""Counting parameters as a person understands them."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters.

    A bitsandbytes 4-bit weight is packed two to a byte, whatever the dtype it is stored in, and counts as what it
    stands for; a parameter that a sharded run emptied counts with its full size.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if count == 0:
            count = getattr(parameter, "ds_numel", 0)
        if _is_packed(parameter):
            count *= 2 * parameter.element_size()
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def _is_packed(parameter: Any) -> bool:
    """Whether a parameter holds 4-bit values; one of that class has its own dtype until it is quantized."""
    return type(parameter).__name__ == "Params4bit" and (parameter.bnb_quantized or not parameter.is_floating_point())
