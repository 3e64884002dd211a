"""The one place where the first adapted model is announced: upper layers register, the model layer calls.

So importing nbpeft changes nothing in other libraries (the package root registers the patch of the
Trainers here), and the model layer imports nothing from the layers above it.
"""

from __future__ import annotations

from collections.abc import Callable

_calls: list[Callable[[], None]] = []


def when_adapted(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a handle on an adapted model is made; it should be quick the second time."""
    if call not in _calls:
        _calls.append(call)


def adapted() -> None:
    """Runs what was registered; ``BaseTuner`` calls it when it is made, copied or unpickled."""
    for call in _calls:
        call()
