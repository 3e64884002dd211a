"""Blocks of 256 weights: the bytes are those of llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import hashlib
import os
from typing import Any

import gguf
import numpy as np
import pytest

from nbpeft.checkpoint import k_quants
from tests.clients.packages import LLAMA_CPP, installed

TYPES = ("q4_k", "q5_k", "q6_k")
DIGESTS = {
    ("q4_k", False): "abc128c56e378a9b",
    ("q4_k", True): "a29d3fc201f5fde1",
    ("q5_k", False): "f015a534128b31a7",
    ("q5_k", True): "742c80ab64c5920c",
    ("q6_k", False): "31b2a59b2271ea64",
    ("q6_k", True): "77772436b1813514",
}
"""Of what llama.cpp (xllamacpp 2026.10.11549) writes for ``numbers(24, 512)``, without and with importance."""


def numbers(rows: int, columns: int, power: int = 3) -> Any:
    """A matrix that is the same everywhere, with few large numbers; some rows are special."""
    places = np.arange(rows * columns, dtype=np.uint64)
    uniform = ((places * 2654435761) % 2**32).astype(np.float64) / 2**31 - 1
    made = (uniform**power * 0.05).astype(np.float32).reshape(rows, columns)
    made[1], made[2, :256], made[3, 32:64], made[4] = 0, 0, 0, 0.5
    made[5], made[6], made[7, 5] = -0.5, np.abs(made[6]), 100
    made[8], made[9] = made[8] * np.float32(1e-9), np.round(made[9] * 64) / 8
    return made


def importance(columns: int) -> Any:
    """How much columns count: a few not at all."""
    made = (np.arange(columns) * 37 % 101 / 101).astype(np.float32) ** 2
    made[::29] = 0
    return made


def quantized(stored_as: str, weighted: bool) -> Any:
    return k_quants.quantize(numbers(24, 512), stored_as, importance(512) if weighted else None)


@pytest.mark.parametrize(("stored_as", "weighted"), DIGESTS)
def test_the_bytes_are_those_of_llama_cpp(stored_as: str, weighted: bool) -> None:
    found = quantized(stored_as, weighted)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == DIGESTS[stored_as, weighted]


@pytest.mark.slow
@pytest.mark.parametrize("stored_as", TYPES)
def test_llama_cpp_itself_writes_the_same(stored_as: str) -> None:
    (path,) = (installed(*LLAMA_CPP) / "xllamacpp").glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path), mode=os.RTLD_LAZY)
    convert = library.ggml_quantize_chunk
    convert.restype = ctypes.c_size_t
    convert.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    for weight in (numbers(24, 512), numbers(64, 1536, power=1), numbers(16, 256, power=9)):
        rows, columns = weight.shape
        for counts in (None, importance(columns)):
            expected = np.zeros_like(k_quants.quantize(weight, stored_as, counts))
            kind = gguf.GGMLQuantizationType[stored_as.upper()]
            given = None if counts is None else counts.ctypes.data
            convert(int(kind), weight.ctypes.data, expected.ctypes.data, 0, rows, columns, given)
            assert np.array_equal(k_quants.quantize(weight, stored_as, counts), expected), (rows, columns)


@pytest.mark.parametrize(("stored_as", "error"), [("q4_k", 0.08), ("q5_k", 0.04), ("q6_k", 0.02)])
def test_readers_get_values_near_the_weights(stored_as: str, error: float) -> None:
    weight = numbers(64, 512, power=1)[10:]
    kind = gguf.GGMLQuantizationType[stored_as.upper()]
    found = gguf.quants.dequantize(k_quants.quantize(weight, stored_as), kind)
    assert np.linalg.norm(found - weight) < error * np.linalg.norm(weight)


@pytest.mark.parametrize("stored_as", TYPES)
def test_errors_where_columns_count_become_smaller(stored_as: str) -> None:
    weight = numbers(64, 512, power=1)
    counts = np.where(np.arange(512) % 4 == 0, 1, 1e-3).astype(np.float32)
    kind = gguf.GGMLQuantizationType[stored_as.upper()]
    losses = []
    for given in (None, counts):
        found = gguf.quants.dequantize(k_quants.quantize(weight, stored_as, given), kind)
        losses.append(float(((found - weight) ** 2 * counts).sum()))
    assert losses[1] < 0.99 * losses[0]


def test_parts_do_not_show() -> None:
    weight = numbers(600, 512)
    whole = k_quants.quantize(weight, "q4_k")
    rows = [k_quants.quantize(weight[row : row + 1], "q4_k") for row in (0, 255, 256, 599)]
    assert np.array_equal(whole[[0, 255, 256, 599]], np.concatenate(rows))
