"""Combining adapters into one, and hot-swapping one for another."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PEFT, Measure, Row, Size, timed
from tests.benchmarks.models import Chain, with_adapters
from tests.benchmarks.rows_adapters import saved_by_peft


def combined(name: str, size: Size, count: int, **options: Any) -> Measure:
    """Seconds of ``add_weighted_adapter`` of ``count`` adapters on one wide layer."""
    model = with_adapters(name, Chain(1, size.wide), count, r=16, init_lora_weights=False)
    names = [f"a{number}" for number in range(count)]
    weights = [0.7, 0.3, *[0.1] * count][:count]

    def measure() -> float:
        seconds = timed(lambda: model.add_weighted_adapter(names, weights, "mix", **options))
        model.delete_adapter("mix")
        return seconds

    return measure


def by_svd(name: str, size: Size) -> Measure:
    """The best rank-r factors of the weighted sum of two."""
    return combined(name, size, 2, combination_type="svd")


def all_by_svd(name: str, size: Size) -> Measure:
    """The same of all ``adapters``."""
    return combined(name, size, size.adapters, combination_type="svd", svd_rank=16)


def by_ties(name: str, size: Size) -> Measure:
    """TIES on the factors of two."""
    return combined(name, size, 2, combination_type="ties", density=0.5)


def swapped(name: str, size: Size) -> Measure:
    """``hotswap_adapter`` from a file, into the only adapter."""
    return swapped_beside(name, dataclasses.replace(size, adapters=1))


def swapped_beside(name: str, size: Size) -> Measure:
    """``hotswap_adapter`` from a file, into one of ``adapters``."""
    folder = tempfile.TemporaryDirectory()
    saved = str(saved_by_peft(size, Path(folder.name)))
    model = with_adapters(name, Chain(size.file_modules, 16 * size.small), size.adapters, r=8)
    home = "peft.utils.hotswap" if name == PEFT else name
    swap: Callable[..., object] = importlib.import_module(home).hotswap_adapter

    def measure(kept: object = folder) -> float:
        start = time.process_time()
        swap(model, saved, "a0", torch_device="cpu")
        return time.process_time() - start

    return measure


ROWS = [
    Row("combine-svd", "combine two adapters by SVD, d = 2,048, r = 16", "seconds", 0.01, by_svd, repeats=3),
    Row("combine-ties", "combine two adapters by TIES, the same layer", "seconds", 1.0, by_ties),
    Row("hot-swap", "hot-swap, 301 modules, 9.9 MB, CPU time", "seconds", 0.45, swapped),
]
