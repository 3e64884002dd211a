"""A thousand adapters over one base, of which some fit: a request for one that is elsewhere."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.harness import PEFT, Measure, Row, Size, library, timed
from tests.benchmarks.models import smollm2_layers

ADAPTERS = 1000
_LAYERS = 30
_DISTINCT = 4
"""Folders really written: a thousand of 9.8 MB would fill a disk, and the names share them."""


def _base(size: Size) -> torch.nn.Module:
    return smollm2_layers(size.hidden, torch.float32, max(1, _LAYERS * size.file_modules // 301))


def _folders(size: Size, root: Path) -> list[Path]:
    """Adapters of all linear layers, rank 8, written by peft."""
    source = library(PEFT)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = source.get_peft_model(_base(size), source.LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    for number in range(_DISTINCT):
        model.save_pretrained(root / str(number))
    return [root / str(number) for number in range(_DISTINCT)]


def _by_hand(size: Size, folders: list[Path]) -> Measure:
    """What one does without a pool: load the new one, activate it, delete the oldest."""
    names = [f"a{number}" for number in range(size.adapters)]
    model = library(PEFT).PeftModel.from_pretrained(_base(size), str(folders[0]), adapter_name=names[0])
    for number, name in enumerate(names[1:]):
        model.load_adapter(str(folders[number % _DISTINCT]), adapter_name=name)
    fresh = itertools.count(size.adapters)

    def request() -> None:
        number = next(fresh)
        model.load_adapter(str(folders[number % _DISTINCT]), adapter_name=f"a{number}")
        model.set_adapter(f"a{number}")
        model.delete_adapter(f"a{number - size.adapters}")

    return lambda: timed(request)


def _pool(size: Size, folders: list[Path], host_limit_mb: float) -> Any:
    """A pool with room for just ``adapters`` of them, all in use."""
    one = sum(path.stat().st_size for path in folders[0].glob("*.safetensors")) / 1e6
    source = library("nbpeft")
    pool = source.AdapterPool(_base(size), (size.adapters + 0.5) * one, host_limit_mb=host_limit_mb)
    for number in range(ADAPTERS):
        pool.register(f"a{number}", folders[number % _DISTINCT])
    for number in range(size.adapters):
        pool.load(f"a{number}")
    return pool


def from_disk(name: str, size: Size) -> Measure:
    """A request for an adapter that is only on disk."""
    folder = tempfile.TemporaryDirectory()
    folders = _folders(size, Path(folder.name))
    if name == PEFT:
        by_hand = _by_hand(size, folders)
        return lambda kept=folder: by_hand()  # type: ignore[misc]
    pool = _pool(size, folders, host_limit_mb=0)
    turn = itertools.count(size.adapters)
    return lambda kept=folder: timed(lambda: pool.set_adapter(f"a{next(turn) % ADAPTERS}"))  # type: ignore[misc]


def prefetched(name: str, size: Size) -> Measure:
    """The same where a prefetch has brought it to host memory meanwhile."""
    folder = tempfile.TemporaryDirectory()
    folders = _folders(size, Path(folder.name))
    if name == PEFT:
        by_hand = _by_hand(size, folders)
        return lambda kept=folder: by_hand()  # type: ignore[misc]
    pool = _pool(size, folders, host_limit_mb=1000)
    turn = itertools.count(size.adapters)

    def measure(kept: object = folder) -> float:
        wanted = f"a{next(turn) % ADAPTERS}"
        pool.prefetch(wanted, wait=True)
        return timed(lambda: pool.set_adapter(wanted))

    return measure


ROWS = [
    Row("pool-miss", "pool of 1,000, 16 fit (210 modules, 9.8 MB each): one from disk", "seconds", 0.1, from_disk),
    Row("pool-prefetched", "the same, read ahead", "seconds", 0.05, prefetched),
]
