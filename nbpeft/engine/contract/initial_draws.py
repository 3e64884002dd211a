"""The random numbers of new parameters, drawn as torch's own modules draw theirs.

New numbers come from the default generator, where and in the dtype in which torch makes new tensors (the CPU and
float32 unless somebody set another one), and are then moved to the layer: one seed gives one start on every device.
On a layer in half precision they are rounded to its dtype first.

What the original implementation of a method keeps in ``nn.Linear``, ``nn.Embedding`` or a convolution was drawn there
once before the method's own init overwrote it. Such numbers are drawn here, too: whatever is drawn later, the next
layer, dropout, the order of the data, depends on how far the generator has moved. Each method says so in its
``create``, before its own init.
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
    """Fills a weight (out, in, …) as a new linear layer or convolution does: uniform in 1 / sqrt(fan in).

    Args:
        tensor: the weight; or a bias, of which ``fan_in`` has to be given.
        fan_in: inputs of each output; those that the shape of a weight says.
    """
    bound = 1 / math.sqrt(fan_in) if fan_in else _bound(max(1, math.prod(tensor.shape[1:])))
    return tensor.uniform_(-bound, bound)


@lru_cache(maxsize=256)
def _bound(fan_in: int) -> float:
    """What ``nn.init.kaiming_uniform_`` computes for a weight of ``nn.Linear``, rounded as there."""
    return math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(fan_in))


def normal_(tensor: Tensor, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Fills a tensor with normal numbers."""
    return tensor.normal_(mean, std)


def drawn(
    shape: Sequence[int], fill: Fill, device: torch.device, dtype: torch.dtype, through: torch.dtype | None = None
) -> Tensor:
    """A new tensor of random numbers.

    Args:
        shape: of the tensor.
        fill: fills it.
        device: where it goes; for the meta device nothing is drawn.
        dtype: its dtype in the end.
        through: a dtype that it is rounded to before.
    """
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    made = _empty(shape)
    fill(made)
    if through is not None:
        made = made.to(through)
    return made.to(device, dtype)


def skip(fill: Fill, device: torch.device, *shapes: Sequence[int]) -> None:
    """Draws numbers that nobody needs, so that the generator moves as far as if they were.

    Args:
        fill: fills a tensor.
        device: where they would go, as for ``drawn``.
        *shapes: of the tensors, one after the other.
    """
    for shape in shapes if device.type != "meta" else ():
        fill(_empty(shape))


def skip_linear(device: torch.device, *shapes: Sequence[int]) -> None:
    """Draws what new linear layers and convolutions draw for their weights and biases, and drops it; see ``skip``."""
    skip(Tensor.uniform_, device, (sum(map(math.prod, shapes)),))


def dtype_in_layer(base: BaseLayer) -> torch.dtype | None:
    """The dtype of a layer, through which modules go that are moved to it; None where its weight has no such dtype."""
    weight = base.module._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    # A weight in integers need not say what it is computed in.
    return base.dtype if weight is None or "compute_dtype" in base.module.__dict__ else None


def _empty(shape: Sequence[int]) -> Tensor:
    made = torch.empty(shape)
    # Under `torch.device("meta")` a layer that has values gets an adapter that has some.
    return torch.empty(shape, device="cpu") if made.is_meta else made
