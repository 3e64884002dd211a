"""Adapters on disk and pools of them, shared by the tests of pools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nbpeft.model import PeftModel
from nbpeft.model.swapping.pool import AdapterPool
from tests.closeness import assert_close
from tests.tiny_models import adapted, llama, logits, randomize

BYTES = 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4) * 4
"""q_proj and v_proj of two layers at rank 4, float32."""
MB = 10**6


def save(folder: Path, seed: int, make: Callable[[], Any] = llama, **changes: Any) -> Path:
    """An adapter whose every tensor is drawn from a seed."""
    model = adapted(make(), **changes)
    randomize(model, seed=seed)
    model.save_pretrained(folder)
    return folder


def make_folders(root: Path) -> dict[str, Path]:
    """Six adapters, a to f."""
    return {name: save(root / name, seed) for seed, name in enumerate("abcdef")}


def make_alone(folders: dict[str, Path]) -> dict[str, Tensor]:
    """What each adapter gives when it is loaded by itself."""
    outputs = {name: logits(PeftModel.from_pretrained(llama(), folder)) for name, folder in folders.items()}
    return {**outputs, "__base__": logits(llama())}


def pool_of(folders: dict[str, Path], room: float = 2, host: float = 100, **options: Any) -> AdapterPool:
    return AdapterPool(llama(), room * BYTES / MB, host_limit_mb=host * BYTES / MB, adapters=dict(folders), **options)


def near(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected)


def device_bytes(pool: AdapterPool) -> int:
    """Counted anew from the model itself."""
    adapters = [adapter for layer in pool.manager.layers.values() for adapter in layer.adapters.children()]
    copies = [copied for module in pool.manager.copies.values() for copied in module.modules_to_save.children()]
    return sum(tensor.nbytes for module in (*adapters, *copies) for tensor in module.state_dict().values())
