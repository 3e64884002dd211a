"""Accelerators by name, with the memory that programs can use. Imports no torch, so that completion is fast.

NVIDIA and AMD cards: the value of ``torch.cuda.get_device_properties(0).total_memory``, taken from out-of-memory
messages in public issues ("total capacity of 14.76 GiB" on a T4, 44.53 GiB on an L40S); error correction and the
driver reserve the rest. Apple: Metal's ``recommendedMaxWorkingSetSize``, two thirds of the unified memory up to
32 GB and three quarters above (llama.cpp logs 10922.67 MiB of 16 GB, 21845.34 of 32, 49152 of 64, 73728 of 96).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from nbpeft.errors import did_you_mean

THIS_MACHINE = "this-machine"
"""Name for the model's device, or the best device of this machine if there is no model."""

_GIB = 2**30
_CARDS = {
    "T4": 14.74, "P100": 15.89, "V100-16GB": 15.78, "V100-32GB": 31.74, "L4": 22.03, "A10G": 22.06, "A10": 22.06,
    "A40": 44.34, "L40S": 44.39, "A100-40GB": 39.39, "A100-80GB": 79.15, "H100": 79.1, "H200": 139.72, "MI300X": 191.69,
    "RTX3060": 11.75, "RTX3070": 7.78, "RTX3080": 9.77, "RTX3090": 23.68, "RTX4060": 7.75, "RTX4070": 11.72,
    "RTX4080": 15.7, "RTX4090": 23.64, "RTX5090": 31.36, "RTXA6000": 47.53, "RTX2080Ti": 10.75,
}  # fmt: skip
WITHOUT_BFLOAT16 = frozenset({"T4", "P100", "V100-16GB", "V100-32GB", "RTX2080Ti"})
"""Cards from before Ampere (compute capability 8), which have no instructions for bfloat16, but for float16."""
_APPLE = {"M1": (8, 16, 32, 64, 128), "M2": (8, 16, 24, 32, 64, 96, 192), "M3": (8, 16, 24, 36, 48, 64, 96, 128),
          "M4": (16, 24, 32, 36, 48, 64, 128)}  # fmt: skip


def _apple(size: int) -> int:
    return size * _GIB * 3 // 4 if size > 32 else size * _GIB * 2 // 3


DEVICES: Mapping[str, int] = {
    **{name: int(size * _GIB) for name, size in _CARDS.items()},
    **{f"{chip}-{size}GB": _apple(size) for chip, sizes in _APPLE.items() for size in sizes},
}
"""Name of a device -> usable memory in bytes."""


def named(text: str) -> str | None:
    """Returns the name in ``DEVICES`` that a text means (``rtx 4090``, ``NVIDIA A100 80GB``, ``M2 16GB``), or None."""
    wanted = _key(text)
    return next((name for name in DEVICES if _key(name) in (wanted, f"rtx{wanted}")), None)


def is_apple(name: str) -> bool:
    """Returns whether a name in ``DEVICES`` is an Apple chip."""
    return name.partition("-")[0] in _APPLE


def nearest(text: str) -> str:
    """Returns `` Did you mean …?`` for an unknown name, or the empty string if no name is similar."""
    key = _key(text)
    sizes = [name for name in DEVICES if key and _key(name).startswith(key)]
    return f" Did you mean {' or '.join(map(repr, sizes[:4]))}?" if sizes else did_you_mean(text.upper(), DEVICES)


def _key(text: str) -> str:
    words = re.sub(r"nvidia|geforce|tesla|amd|apple|instinct|gb\b", "", text.lower())
    return re.sub(r"[^a-z0-9]", "", words)
