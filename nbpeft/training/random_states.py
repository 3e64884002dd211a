"""The random numbers to come: of Python, NumPy, torch and its devices."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """What decides which numbers are drawn next."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states


@contextmanager
def drawing_from(states: Mapping[str, Any] | int) -> Iterator[None]:
    """Draws from earlier states, or from a seed, while the block runs; afterwards as if it had drawn nothing."""
    before = random_states()
    if isinstance(states, int):
        random.seed(states)
        np.random.seed(states % 2**32)
        torch.manual_seed(states)
    else:
        _set(states)
    try:
        yield
    finally:
        _set(before)


def _set(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.random.set_rng_state(states["cuda"])
