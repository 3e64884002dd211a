"""The random numbers of new parameters, drawn in the same order as PEFT draws them.

Numbers come from torch's default generator, on the device and in the dtype in which torch makes new tensors (the CPU
and float32 by default). They are moved to the layer afterwards, so that a seed gives the same values on every device.
On a layer in half precision they are rounded to its dtype first.

The original implementation of a method often stores parameters in ``nn.Linear``, ``nn.Embedding`` or a convolution.
Their constructors draw numbers, which the method's own init then overwrites. Such numbers are drawn here too and
dropped: everything drawn later (the next layer, dropout, the order of the data) depends on how far the generator has
advanced. Each method does this in its ``create``, before its own init.

An adapter that is loaded draws nothing, unlike in PEFT, which initializes it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.base import BaseLayer

Fill = Callable[[Tensor], Any]
"""Fills a tensor with random numbers, in place."""


def linear_(tensor: Tensor, fan_in: int = 0) -> Tensor:
    """Fills a tensor as ``nn.Linear`` and convolutions do: uniform in ±1 / sqrt(fan in).

    Args:
        tensor: a weight, (out, in, …), or a bias, for which ``fan_in`` is required.
        fan_in: number of inputs of each output; by default taken from the shape of the weight.

    Returns:
        ``tensor``.
    """
    bound = 1 / math.sqrt(fan_in) if fan_in else _bound(max(1, math.prod(tensor.shape[1:])))
    return tensor.uniform_(-bound, bound)


@lru_cache(maxsize=256)
def _bound(fan_in: int) -> float:
    """The bound that ``nn.init.kaiming_uniform_`` computes for a weight of ``nn.Linear``, rounded in the same way."""
    return math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(fan_in))


def normal_(tensor: Tensor, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Fills a tensor with normally distributed numbers and returns it."""
    return tensor.normal_(mean, std)


def uniform_(tensor: Tensor, bound: float) -> Tensor:
    """Fills a tensor with numbers that are uniform in ±bound and returns it."""
    return tensor.uniform_(-bound, bound)


def drawn(
    shape: Sequence[int], fill: Fill, device: torch.device, dtype: torch.dtype, through: torch.dtype | None = None
) -> Tensor:
    """A new tensor of random numbers.

    Args:
        shape: shape of the tensor.
        fill: fills it in place.
        device: device of the result; on the meta device nothing is drawn.
        dtype: dtype of the result.
        through: a dtype that the numbers are rounded to first; None for no rounding.

    Returns:
        The tensor.
    """
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    made = _empty(shape)
    fill(made)
    if through is not None:
        made = made.to(through)
    return made.to(device, dtype)


def skip(fill: Fill, device: torch.device, *shapes: Sequence[int]) -> None:
    """Draws random numbers and drops them, to advance the generator as the original implementation does.

    Args:
        fill: fills a tensor in place.
        device: device of the layer; on the meta device nothing is drawn.
        *shapes: shapes of the tensors to fill, one after the other.
    """
    for shape in shapes if device.type != "meta" else ():
        fill(_empty(shape))


def skip_linear(device: torch.device, *shapes: Sequence[int]) -> None:
    """Draws and drops what new linear layers and convolutions draw for their weights and biases; see ``skip``."""
    skip(Tensor.uniform_, device, (sum(map(math.prod, shapes)),))


def dtype_in_layer(base: BaseLayer) -> torch.dtype | None:
    """The dtype to which PEFT casts new modules on a layer, for ``through`` of ``drawn``; None if it does not cast."""
    weight = base.module._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    # An integer weight has a dtype to compute in only if its layer has a `compute_dtype`.
    return base.dtype if weight is None or "compute_dtype" in base.module.__dict__ else None


def _empty(shape: Sequence[int]) -> Tensor:
    made = torch.empty(shape)
    # Inside `torch.device("meta")` too, a layer with real values gets an adapter with real values.
    return torch.empty(shape, device="cpu") if made.is_meta else made
