"""The states of a process's random generators, and blocks that draw from separate ones."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """The states of torch's generators on all devices in use, of Python's, and of NumPy's if it is imported."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the generators to a state that ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])


@contextmanager
def drawing_from(source: dict[str, Any] | int) -> Iterator[None]:
    """Context manager: draws from an earlier state or a seed inside, and restores the current state afterwards.

    Args:
        source: what ``random_state`` returned, or a seed.
    """
    state = random_state()
    if isinstance(source, int):
        torch.manual_seed(source)
        random.seed(source)
        if "numpy" in state:
            sys.modules["numpy"].random.seed(source % 2**32)
    else:
        set_random_state(source)
    try:
        yield
    finally:
        set_random_state(state)


def drawn_places(size: int, count: int, seed: int) -> Tensor:
    """Draws distinct positions in a flattened weight.

    The result is cached, so layers of the same size share the tensor.

    Args:
        size: entries of the weight.
        count: how many positions to draw.
        seed: seed of the generator.

    Returns:
        int64, (count,), on the CPU.
    """
    real = type(torch.empty(0)) is Tensor  # memory estimates run under FakeTensorMode: do not cache fake tensors
    return _drawn_places(size, count, seed) if real else _drawn_places.__wrapped__(size, count, seed)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _drawn_places(size: int, count: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()
