"""What must not be touched from a thread beside the main one: a notebook's cell may run meanwhile."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def in_main_thread() -> bool:
    """Whether this is the thread that cells run in."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings inside it; in another thread than the main one it does nothing, for filters are one for all."""
    if not in_main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
