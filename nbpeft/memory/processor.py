"""In which dtypes this machine's processor has instructions for matrix products.

Torch hands products in half precision to oneDNN where oneDNN takes them. Elsewhere they are computed
number by number, 10 and more times slower than in float32, and what is copied for them differs too.
``ONEDNN_MAX_CPU_ISA``, with which oneDNN passes over what a processor has, counts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

_ASKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_onednn: Any = torch.backends.mkldnn
_TILE_ROWS, _TILE_COLUMNS, _DEPTH, _DEEP = 256, 64, 32, 512
"""Tiles in which oneDNN 3 multiplies: rows and columns of the product, and the depth, in steps and at most."""
HALF = tuple(_ASKS)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes matrix products in a dtype of half precision."""
    if not _onednn.is_available() or not getattr(_onednn, "enabled", True):
        return False
    asked: Any = getattr(torch.ops.mkldnn, _ASKS.get(dtype, ""), None)
    return asked is not None and bool(asked())


def product_scratch(rows: int, depth: int, columns: int, dtype: torch.dtype, *, transposed: bool) -> int:
    """Bytes that oneDNN needs while it multiplies two matrices in half precision.

    Each thread copies a tile of the right matrix, and of a left one that is stored by columns, and sums in float32.

    Args:
        rows: of the left matrix and the product.
        depth: columns of the left matrix, rows of the right one.
        columns: of the right matrix and the product.
        dtype: of both.
        transposed: whether the left one is stored by columns.
    """
    if dtype not in _ASKS or not onednn_multiplies(dtype):
        return 0
    threads = torch.get_num_threads()
    tall = -(-rows // -(-rows // _TILE_ROWS))
    tall = -(-tall // -(-threads // -(-columns // _TILE_COLUMNS)))
    deep = min(-(-depth // _DEPTH) * _DEPTH, _DEEP if depth <= 2 * _DEEP else 2 * _DEEP)
    sums, right = tall * min(columns, _TILE_COLUMNS) * 4, deep * _TILE_COLUMNS * dtype.itemsize
    return threads * (sums + right + (tall * min(deep, _DEEP) * dtype.itemsize if transposed else 0))


def has_instructions(dtype: torch.dtype) -> bool | None:
    """Return whether the processor multiplies matrices in a dtype of half precision with instructions of its own.

    Returns:
        None where torch does not report it, as on Apple's processors.
    """
    if not _onednn.is_available():
        return None
    # With AVX512 alone oneDNN takes bfloat16 too, and converts each number to float32 and back.
    converts = dtype == torch.bfloat16 and _is("avx512") and not _is("avx512_bf16")
    return onednn_multiplies(dtype) and not converts


def _is(instructions: str) -> bool:
    supported: Any = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return supported is not None and bool(supported())


def slow_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of half precision in which a model computes on this processor without instructions for it.

    Returns:
        None where it computes otherwise, or elsewhere: also while there is an accelerator, to which
        it may be moved yet.
    """
    if torch.accelerator.is_available():
        return None
    counts: Counter[torch.dtype] = Counter()
    for module in model.modules():
        computes = getattr(module, "compute_dtype", None)  # of layers in 4 bits
        for parameter in module.parameters(recurse=False):
            dtype = computes if isinstance(computes, torch.dtype) else parameter.dtype
            if parameter.device.type == "cpu" and dtype.is_floating_point:
                counts[dtype] += parameter.numel()
    return next((dtype for dtype, _ in counts.most_common(1) if slow_here(dtype)), None)


def slow_here(dtype: torch.dtype) -> bool:
    """Return whether a dtype is one of half precision for which the processor is known to have no instructions."""
    return dtype in _ASKS and has_instructions(dtype) is False


def slow_dtype_message(*dtypes: torch.dtype, instead: str = "load models with dtype=torch.float32") -> str:
    """Return a sentence that warns of slow dtypes and says what to do instead."""
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"this CPU has no instructions for {names} and is many times faster in float32: {instead}"
