"""What is to happen once a model with adapters exists: layers above register it, the model layer runs it.

So that importing nbpeft changes nothing in other libraries, and the first adapted model does.
"""

from __future__ import annotations

from collections.abc import Callable

_calls: list[Callable[[], None]] = []


def when_adapted(call: Callable[[], None]) -> None:
    """Has ``call`` run whenever a handle on an adapted model is made; it should be quick the second time."""
    if call not in _calls:
        _calls.append(call)


def adapted() -> None:
    """Runs what was registered."""
    for call in _calls:
        call()
