"""Hooks for the creation of configs and adapted models: upper layers register callbacks, lower layers call them.

The package root registers the patch of transformers' Trainer here. So importing nbpeft changes nothing in other
libraries, and the engine and the model layer import nothing from the layers above them.
"""

from __future__ import annotations

from collections.abc import Callable

_when_configured: list[Callable[[], None]] = []
_when_adapted: list[Callable[[], None]] = []


def when_configured(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a config is created; repeated calls should be fast."""
    if call not in _when_configured:
        _when_configured.append(call)


def when_adapted(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a ``BaseTuner`` is created; repeated calls should be fast."""
    if call not in _when_adapted:
        _when_adapted.append(call)


def configured() -> None:
    """Runs the callbacks for configs; called by their constructor."""
    for call in _when_configured:
        call()


def adapted() -> None:
    """Runs the callbacks for models; ``BaseTuner`` calls it when it is created, copied or unpickled."""
    for call in _when_adapted:
        call()
