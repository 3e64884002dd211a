"""Waits for what other threads do: for as long as a loaded machine takes, since no test measures time."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds after which a test gives up; on an idle machine nothing takes a hundredth of that."""


def wait_until(condition: Callable[[], object]) -> None:
    """Returns when a condition holds.

    Raises:
        AssertionError: it never did.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
