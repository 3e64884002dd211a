"""Hot-swapping: replaces the tensors of a loaded adapter by those of another one.

Everything is checked first; then the tensors are overwritten in place. No parameter is
rebound, so a compiled model is not recompiled, provided that its slots were prepared:
tensors padded with zeros to the largest size needed, and scalings stored as tensors.

    padding.py    prepares slots for larger adapters
    writes.py     checks a new adapter against a slot and collects all writes
    swap.py       writes it, lets the caller validate it, and restores the old adapter on failure
"""

from __future__ import annotations

from nbpeft.engine.hotswap.padding import prepare_for_hotswap
from nbpeft.engine.hotswap.swap import Swapped, check_contents, config_for_slot, swap

__all__ = ["Swapped", "check_contents", "config_for_slot", "prepare_for_hotswap", "swap"]
