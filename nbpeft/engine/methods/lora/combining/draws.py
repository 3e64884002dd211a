"""The random draws PEFT makes before it combines.

PEFT adds a freshly initialised adapter and then overwrites it. Types that prune at random
(``dare_*``) therefore start from a generator that has moved on; repeating those draws, thrown
away, gives PEFT's numbers under the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def skip_initial_draws(
    shapes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    lookups: Iterable[bool],
    init: bool | str = True,
    lora_bias: bool = False,
) -> None:
    """Moves the CPU generator as far as initialising a new adapter in PEFT does.

    Args:
        shapes: (shape of A, shape of B) of each layer, in the model's order.
        lookups: for each layer, whether it is an embedding.
        init: ``init_lora_weights`` of the new adapter: True, False or ``"gaussian"``.
        lora_bias: whether B has a bias.
    """
    for (shape_A, shape_B), lookup in zip(shapes, lookups, strict=True):
        if lookup:
            torch.randn(shape_A)
            torch.randn(shape_B)
            if init is not False:
                torch.empty(shape_B).normal_()
            continue
        torch.empty(shape_A).uniform_()
        torch.empty(shape_B).uniform_()
        if lora_bias:
            torch.empty(shape_B[0]).uniform_()
        if init is True:
            torch.empty(shape_A).uniform_()
        elif init == "gaussian":
            torch.empty(shape_A).normal_()
