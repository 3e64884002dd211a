"""Grouped-query attention on the CPU without repeating keys and values for each query head.

With an attention mask transformers repeats keys and values, because the fast kernels of accelerators do not support
grouped heads together with a mask. The CPU kernel does. Outputs are the same bit for bit, and autograd stores only a
third to an eighth of the bytes of keys and values for backward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "TRANSFORMERS_SDPA_FORCE_GQA"
"""Environment variable that transformers reads in each call of its attention."""
_lock = threading.Lock()
_blocks = 0
"""Number of open blocks that rely on the variable; it belongs to the process, so threads share it."""


@contextmanager
def grouped_heads(model: nn.Module) -> Iterator[None]:
    """Context manager: attention does not repeat keys and values.

    Only for a model on the CPU, and only if the user has not set the environment variable.

    Args:
        model: a model with or without adapters; only models of transformers are affected.
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
