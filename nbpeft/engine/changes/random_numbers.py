"""The random numbers of a process: their state, and blocks that have random numbers of their own."""

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
    """The state of the random numbers of torch, on all devices in use, of Python, and of NumPy where it is imported."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Goes on from a state that ``random_state`` has returned."""
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
    """Context manager: draws go on from an earlier state, or from a seed; afterwards as if none had been drawn.

    Args:
        source: what ``random_state`` has returned, or a seed.
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
    """Different places in a flat weight, drawn from a seed, (count,), on the CPU; layers of one size share them."""
    real = type(torch.empty(0)) is Tensor  # a forecast computes with tensors that hold nothing
    return _drawn_places(size, count, seed) if real else _drawn_places.__wrapped__(size, count, seed)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _drawn_places(size: int, count: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()
