"""Lets torch and bitsandbytes tell of another processor than that of this machine."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def pretend_cpu(
    monkeypatch: pytest.MonkeyPatch, *, onednn: Collection[torch.dtype] = (), instructions: Collection[str] = ()
) -> None:
    """A processor for which oneDNN takes products in some dtypes, and with some sets of instructions."""

    def answers(value: bool) -> Callable[[], bool]:
        return lambda: value

    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    asked = {f"_is_mkldnn_{name}_supported": answers(dtype in onednn) for dtype, name in names.items()}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**asked))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("avx512", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", answers(name in instructions), raising=False)


def pretend_repacking(monkeypatch: pytest.MonkeyPatch, repacks: bool) -> None:
    """A processor on which bitsandbytes re-packs the 4-bit weights of layers that are made from now on, or does not.

    Where the library has no kernel for re-packed weights, they are multiplied as that kernel does it.
    """
    functional, layers = (importlib.import_module(f"bitsandbytes.{name}") for name in ("functional", "nn.modules"))
    if repacks and not functional.has_avx512bf16():
        monkeypatch.setattr(functional, "gemv_4bit", repacked_product)
    monkeypatch.setattr(layers, "has_avx512bf16", lambda: repacks)


def repack(layer: Any) -> None:
    """Re-packs the weight of a layer, as the library does in the layer's first evaluation."""
    pack = importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu
    layer.support_avx512bf16_for_cpu = True
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)


def repacked_product(x: Tensor, packed: Tensor, *_: Any, state: Any, **__: Any) -> Tensor:
    """The product with a re-packed weight as bitsandbytes computes it on processors with AVX512-BF16.

    Input, levels, constants and output are rounded to bfloat16; the sum of each block is float32 and multiplied by
    the block's constant.
    """
    codes, _ = importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(
        packed, copy.copy(state)
    )
    (rows, columns), size = state.shape, state.blocksize
    levels = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, torch.ones(rows * columns // size), size, state.quant_type, state.shape, torch.float32
    )
    blocks = [part.bfloat16().float().view(-1, columns // size, size) for part in (x, levels)]
    sums = torch.einsum("xbi,rbi->xrb", *blocks) * state.absmax.float().t()
    return sums.sum(-1).bfloat16().to(x.dtype).view(*x.shape[:-1], rows)
