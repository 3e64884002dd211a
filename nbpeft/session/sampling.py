"""How the next token is chosen: the likeliest one, or drawn with random numbers of its own."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from nbpeft.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The settings of a generation. Greedy unless ``temperature`` or ``top_p`` is given.

    Attributes:
        temperature: by which logits are divided; 0 is greedy.
        top_p: draw among the likeliest tokens that have this probability together.
        seed: of the random numbers; drawn, and shown with the answer, where it is left out.

    Raises:
        ConfigError: a value is impossible.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not (_is_number(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a number of at least 0, not {self.temperature!r:.60}")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p!r:.60}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**63):
            raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r:.60}")
        if self.draws and self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randrange(10**6))

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature != 0 and not (self.temperature is None and self.top_p is None)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``: temperature and top-p decide, and no top-k of the model's beside them."""
        if not self.draws:
            return {}
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        return {"do_sample": True, "temperature": temperature, "top_p": float(self.top_p or 1.0), "top_k": 0}

    @property
    def settings(self) -> Mapping[str, float]:
        """What a person may want to repeat; empty where greedy."""
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
        """Context manager: random numbers of its own, so that those of the notebook go on as if it had not been."""
        if not self.draws or self.seed is None:
            return nullcontext()
        from nbpeft.engine.changes.random_numbers import drawing_from

        return drawing_from(self.seed)


def shown_settings(settings: Mapping[str, float]) -> str:
    """``temperature 0.7, top-p 0.9, seed 12``; the empty string where greedy."""
    return ", ".join(f"{name} {value:g}" if name != "seed" else f"seed {value}" for name, value in settings.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
