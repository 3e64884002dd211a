"""How the next token is chosen: the most likely one, or sampled with separate random numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from nbpeft._util.numeric import is_finite_number
from nbpeft.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a generation, which is greedy unless ``temperature`` or ``top_p`` is given.

    Attributes:
        temperature: divisor of the logits; 0 is greedy.
        top_p: sample from the most likely tokens whose probabilities sum up to this value.
        seed: seed of the random numbers; if None, a random one, which is shown with the answer.

    Raises:
        ConfigError: a value is invalid.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not (is_finite_number(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a number of at least 0, not {self.temperature!r:.60}")
        if self.top_p is not None and not (is_finite_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p!r:.60}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**63):
            raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r:.60}")
        if self.draws and self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randrange(10**6))

    @property
    def draws(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature != 0 and not (self.temperature is None and self.top_p is None)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``: only temperature and top-p apply, and not the model's default top-k."""
        if not self.draws:
            return {}
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        return {"do_sample": True, "temperature": temperature, "top_p": float(self.top_p or 1.0), "top_k": 0}

    @property
    def settings(self) -> Mapping[str, float]:
        """The settings that are needed to repeat the generation; empty for greedy decoding."""
        given = {"temperature": self.temperature, "top-p": self.top_p, "seed": self.seed}
        return {name: value for name, value in given.items() if value is not None} if self.draws else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Settings that have no effect."""
        idle = [name for name, value in (("top-p", self.top_p), ("seed", self.seed)) if value is not None]
        if self.draws or not idle:
            return ()
        return (f"{' and '.join(idle)} without effect: the answer is greedy; sampling needs a temperature above 0",)

    def random_numbers(self) -> AbstractContextManager[None]:
        """Context manager: uses separate random numbers, so that the notebook's random state does not change."""
        if not self.draws or self.seed is None:
            return nullcontext()
        from nbpeft.engine.changes.random_numbers import drawing_from

        return drawing_from(self.seed)


def shown_settings(settings: Mapping[str, float]) -> str:
    """Returns e.g. ``temperature 0.7, top-p 0.9, seed 12``; the empty string for greedy decoding."""
    return ", ".join(f"{name} {value:g}" if name != "seed" else f"seed {value}" for name, value in settings.items())
