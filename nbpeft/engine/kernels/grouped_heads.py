"""Attention of a model on the CPU in which several query heads share a key and a value, as they are.

transformers repeats keys and values for each query head where there is a mask, because an accelerator's fast kernels
take no groups with one. The CPU's kernel does: same outputs bit by bit, and a third to an eighth of the bytes of keys
and values is kept for backward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "TRANSFORMERS_SDPA_FORCE_GQA"
"""An environment variable that transformers reads with each call of its attention."""
_lock = threading.Lock()
_blocks = 0
"""How many blocks are open that have set it."""


@contextmanager
def grouped_heads(model: nn.Module) -> Iterator[None]:
    """A block in which attention does not repeat keys and values, where a model lies on the CPU and nobody has chosen.

    Args:
        model: of transformers, with or without adapters; any other is as it was.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or not _opened():
        yield
        return
    try:
        yield
    finally:
        _close()


def _opened() -> bool:
    global _blocks
    with _lock:
        if not _blocks and _SWITCH in os.environ:
            return False
        os.environ[_SWITCH] = "1"
        _blocks += 1
        return True


def _close() -> None:
    global _blocks
    with _lock:
        _blocks -= 1
        if not _blocks:
            os.environ.pop(_SWITCH, None)
