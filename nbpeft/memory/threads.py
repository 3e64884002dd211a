"""What must not be touched from a thread beside the main one: a notebook's cell may run meanwhile."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def in_main_thread() -> bool:
    """Whether this is the thread that cells run in."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings inside it, and no tracebacks that torch logs of operations on fake tensors that fail.

    In another thread than the main one it does nothing, for filters are one for all.
    """
    if not in_main_thread():
        yield
        return
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
