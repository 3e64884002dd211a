"""Hooks for the import of the engine and for new configs, models and scorers: upper layers register callbacks.

The package root registers PEFT's attributes of layers, configs and models, the patch of transformers' Trainer, and what
scores a model in training. So importing nbpeft changes nothing in other libraries, and no layer imports from the layers
above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_when_imported: list[Callable[[], None]] = []
_when_configured: list[Callable[[], None]] = []
_when_adapted: list[Callable[[], None]] = []
_scorers: list[Callable[..., Any]] = []


def when_engine_imported(call: Callable[[], None]) -> None:
    """Registers ``call`` to run when the engine is imported, as by the first config or by unpickling a model."""
    if call not in _when_imported:
        _when_imported.append(call)


def when_configured(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a config is created; repeated calls should be fast."""
    if call not in _when_configured:
        _when_configured.append(call)


def when_adapted(call: Callable[[], None]) -> None:
    """Registers ``call`` to run whenever a ``BaseTuner`` is created; repeated calls should be fast."""
    if call not in _when_adapted:
        _when_adapted.append(call)


def engine_imported() -> None:
    """Runs the callbacks for the engine; called at the end of its import."""
    for call in _when_imported:
        call()


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
    """Makes a scorer; see ``nbpeft.scoring.in_training.RowScorer`` for the arguments."""
    return _scorers[0](*args, **options)
