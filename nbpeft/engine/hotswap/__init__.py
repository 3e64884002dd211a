"""Hot-swapping: another adapter's tensors in the place of one that is loaded.

Everything is checked first; then the tensors are overwritten where they lie. No parameter is
rebound, so a compiled model goes on without compiling again, as long as its slots were
prepared: tensors padded with zeros to the largest size to come, scalings held as tensors.

    padding.py    making room in a slot
    writes.py     checks a new adapter against a slot and works out all that will be written
    swap.py       writes it, lets the caller validate it, or puts the old adapter back
"""

from __future__ import annotations

from nbpeft.engine.hotswap.padding import prepare_for_hotswap
from nbpeft.engine.hotswap.swap import Swapped, check_contents, config_for_slot, swap

__all__ = ["Swapped", "check_contents", "config_for_slot", "prepare_for_hotswap", "swap"]
