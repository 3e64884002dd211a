"""The random draws that PEFT makes before combining.

PEFT adds a freshly initialized adapter and then overwrites it. Types that prune at random
(``dare_*``) therefore start from a generator that has advanced; repeating and discarding those
draws gives PEFT's numbers with the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nbpeft.engine.contract.initial_draws import normal_, skip, skip_linear

_CPU = torch.device("cpu")


def skip_initial_draws(
    shapes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    lookups: Iterable[bool],
    init: bool | str = True,
    lora_bias: bool = False,
) -> None:
    """Advances the CPU generator as initializing a new adapter in PEFT does.

    Args:
        shapes: (shape of A, shape of B) of each layer, in the model's order.
        lookups: for each layer, whether it is an embedding.
        init: ``init_lora_weights`` of the new adapter: True, False or ``"gaussian"``.
        lora_bias: whether B has a bias.
    """
    for (shape_A, shape_B), lookup in zip(shapes, lookups, strict=True):
        if lookup:
            skip(normal_, _CPU, shape_A, shape_B, *([] if init is False else [shape_B]))
            continue
        skip_linear(_CPU, shape_A, shape_B, *([shape_B[:1]] if lora_bias else []))
        if init is True:
            skip_linear(_CPU, shape_A)
        elif init == "gaussian":
            skip(normal_, _CPU, shape_A)
