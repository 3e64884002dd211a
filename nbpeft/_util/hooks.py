"""Where the first config and the first adapted model are announced: upper layers register, lower ones call.

So importing nbpeft changes nothing in other libraries (the package root registers the patch of the
Trainers here), and the engine and the model layer import nothing from the layers above them.
"""

from __future__ import annotations

from collections.abc import Callable

_when_configured: list[Callable[[], None]] = []
_when_adapted: list[Callable[[], None]] = []


def when_configured(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a config is made; it should be quick the second time."""
    if call not in _when_configured:
        _when_configured.append(call)


def when_adapted(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a handle on an adapted model is made; it should be quick the second time."""
    if call not in _when_adapted:
        _when_adapted.append(call)


def configured() -> None:
    """Runs what was registered for configs; their constructor calls it."""
    for call in _when_configured:
        call()


def adapted() -> None:
    """Runs what was registered for models; ``BaseTuner`` calls it when it is made, copied or unpickled."""
    for call in _when_adapted:
        call()
