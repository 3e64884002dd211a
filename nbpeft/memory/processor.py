"""Which half-precision dtypes this machine's CPU has matrix-product instructions for.

torch passes half-precision products to oneDNN if oneDNN supports them. Otherwise they are computed element by element,
at least 10 times slower than in float32, and with other temporary copies. The environment variable
``ONEDNN_MAX_CPU_ISA``, which disables instructions in oneDNN, is respected.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from nbpeft.engine.kernels.numerics import onednn_multiplies

_TILE_ROWS, _TILE_COLUMNS, _DEPTH, _DEEP = 256, 64, 32, 512
"""Tile sizes of oneDNN 3: rows and columns of the product; multiples and maximum of the inner dimension."""
HALF = (torch.bfloat16, torch.float16)


def product_scratch(rows: int, depth: int, columns: int, dtype: torch.dtype, *, transposed: bool) -> int:
    """Return the temporary memory in bytes of oneDNN's product of two half-precision matrices.

    Each thread copies a tile of the right matrix, and one of the left matrix if it is stored column by column, and
    accumulates in float32.

    Args:
        rows: rows of the left matrix and of the product.
        depth: columns of the left matrix, rows of the right one.
        columns: columns of the right matrix and of the product.
        dtype: dtype of both matrices.
        transposed: whether the left matrix is stored column by column.
    """
    if not onednn_multiplies(dtype):
        return 0
    threads = torch.get_num_threads()
    tall = -(-rows // -(-rows // _TILE_ROWS))
    tall = -(-tall // -(-threads // -(-columns // _TILE_COLUMNS)))
    deep = min(-(-depth // _DEPTH) * _DEPTH, _DEEP if depth <= 2 * _DEEP else 2 * _DEEP)
    sums, right = tall * min(columns, _TILE_COLUMNS) * 4, deep * _TILE_COLUMNS * dtype.itemsize
    return threads * (sums + right + (tall * min(deep, _DEEP) * dtype.itemsize if transposed else 0))


def has_instructions(dtype: torch.dtype) -> bool | None:
    """Return whether the CPU has matrix-product instructions for a half-precision dtype.

    Returns:
        None if torch does not report it, as on Apple's CPUs.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    # With AVX512 but without AVX512-BF16, oneDNN accepts bfloat16 and converts each element to float32 and back.
    converts = dtype == torch.bfloat16 and _is("avx512") and not _is("avx512_bf16")
    return onednn_multiplies(dtype) and not converts


def _is(instructions: str) -> bool:
    supported: Any = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return supported is not None and bool(supported())


def slow_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the half-precision dtype in which a model computes slowly, because this CPU has no instructions for it.

    Returns:
        None if the model has no such dtype, if it is not on the CPU, or if the machine has an accelerator, to which
        the model may still be moved.
    """
    if torch.accelerator.is_available():
        return None
    counts: Counter[torch.dtype] = Counter()
    for module in model.modules():
        computes = getattr(module, "compute_dtype", None)  # of 4-bit layers
        for parameter in module.parameters(recurse=False):
            dtype = computes if isinstance(computes, torch.dtype) else parameter.dtype
            if parameter.device.type == "cpu" and dtype.is_floating_point:
                counts[dtype] += parameter.numel()
    return next((dtype for dtype, _ in counts.most_common(1) if slow_here(dtype)), None)


def slow_here(dtype: torch.dtype) -> bool:
    """Return whether a dtype is a half-precision one for which the CPU is known to have no instructions."""
    return dtype in HALF and has_instructions(dtype) is False


def slow_dtype_message(*dtypes: torch.dtype, instead: str = "load models with dtype=torch.float32") -> str:
    """Return a sentence that warns about slow dtypes and says what to do instead."""
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"this CPU has no instructions for {names}; float32 is many times faster: {instead}"
