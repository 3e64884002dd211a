"""Hooks for the import of the engine and for new configs, models and scorers: upper layers register callbacks.

The package root registers PEFT's attributes of layers, configs and models, the patch of transformers' Trainer, and what
scores a model in training. So importing nbpeft changes nothing in other libraries, and no layer imports from the layers
above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_scorers: list[Callable[..., Any]] = []


class Event:
    """Callbacks that upper layers register, each once; a call runs all of them."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def register(self, call: Callable[[], None]) -> None:
        """Registers a function to run whenever the event happens; repeated calls of it should be fast."""
        if call not in self._calls:
            self._calls.append(call)

    def __call__(self) -> None:
        for call in self._calls:
            call()


engine_imported = Event()
"""The engine was imported, as by the first config or by unpickling a model; called at the end of its import."""
configured = Event()
"""A config is created; called by its constructor."""
adapted = Event()
"""A model is adapted; ``BaseTuner`` calls it when it is created, copied or unpickled."""
when_engine_imported, when_configured, when_adapted = engine_imported.register, configured.register, adapted.register


def when_scored(make: Callable[..., Any]) -> None:
    """Registers the function that makes the scorers of trainings."""
    _scorers[:] = [make]


def new_scorer(*args: Any, **options: Any) -> Any:
    """Makes a scorer; see ``nbpeft.scoring.in_training.RowScorer`` for the arguments."""
    return _scorers[0](*args, **options)
