"""Counting parameters as a person understands them."""

from __future__ import annotations

from torch import nn


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters.

    A bitsandbytes 4-bit weight is packed two to a byte and counts as what it stands for; a
    parameter that a sharded run emptied counts with its full size.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if count == 0:
            count = getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total
