"""Combining adapters into one, and hot-swapping one for another."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PEFT, Measure, Row, Size, library, timed
from tests.benchmarks.models import Chain
from tests.benchmarks.rows_adapters import saved_by_peft


def combined(name: str, size: Size, kind: str, **options: Any) -> Measure:
    """Seconds of ``add_weighted_adapter`` of two adapters on one wide layer."""
    source = library(name)
    settings: dict[str, Any] = {"r": 16, "target_modules": ["proj"], "init_lora_weights": False}
    model = source.get_peft_model(Chain(1, size.wide), source.LoraConfig(**settings), adapter_name="one")
    model.add_adapter("two", source.LoraConfig(**settings))

    def measure() -> float:
        seconds = timed(
            lambda: model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "mix", combination_type=kind, **options)
        )
        model.delete_adapter("mix")
        return seconds

    return measure


def by_svd(name: str, size: Size) -> Measure:
    """The best rank-r factors of the weighted sum."""
    return combined(name, size, "svd")


def by_ties(name: str, size: Size) -> Measure:
    """TIES on the factors."""
    return combined(name, size, "ties", density=0.5)


def swapped(name: str, size: Size) -> Measure:
    """``hotswap_adapter`` from a file."""
    folder = tempfile.TemporaryDirectory()
    saved = str(saved_by_peft(size, Path(folder.name)))
    model = library(name).PeftModel.from_pretrained(Chain(size.file_modules, 16 * size.small), saved)
    home = "peft.utils.hotswap" if name == PEFT else name
    swap: Callable[..., object] = importlib.import_module(home).hotswap_adapter

    def measure(kept: object = folder) -> float:
        return timed(lambda: swap(model, saved, "default", torch_device="cpu"))

    return measure


ROWS = [
    Row("combine-svd", "combine two adapters by SVD, d = 2,048, r = 16", "seconds", 0.01, by_svd, repeats=3),
    Row("combine-ties", "combine two adapters by TIES, the same layer", "seconds", 1.0, by_ties),
    Row("hot-swap", "hot-swap, 301 modules, 9.9 MB", "seconds", 0.35, swapped),
]
