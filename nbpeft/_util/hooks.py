"""Hooks for the creation of configs, adapted models and scorers: upper layers register callbacks, lower ones call them.

The package root registers the patch of transformers' Trainer here, and what scores a model in training. So importing
nbpeft changes nothing in other libraries, and no layer imports anything from the layers above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_when_configured: list[Callable[[], None]] = []
_when_adapted: list[Callable[[], None]] = []
_scorers: list[Callable[..., Any]] = []


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


def when_scored(make: Callable[..., Any]) -> None:
    """Registers the function that makes the scorers of trainings."""
    _scorers[:] = [make]


def new_scorer(*args: Any, **options: Any) -> Any:
    """Makes a scorer; see ``nbpeft.scoring.in_training.Scorer`` for the arguments."""
    return _scorers[0](*args, **options)
