"""Whether a value that a user gave is a number, and checks of the numbers of which several commands take one."""

from __future__ import annotations

import math
from typing import TypeGuard

from nbpeft.errors import ConfigError


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that fits a float, and no bool."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_temperature(value: object) -> None:
    """Raises ConfigError for a temperature that is neither None nor a number of at least 0."""
    if value is not None and not (is_finite_number(value) and value >= 0):
        raise ConfigError(f"temperature must be a number of at least 0, not {value!r:.60}")


def check_top_p(value: object) -> None:
    """Raises ConfigError for a top-p that is neither None nor above 0 and at most 1."""
    if value is not None and not (is_finite_number(value) and 0 < value <= 1):
        raise ConfigError(f"top_p must be above 0 and at most 1, not {value!r:.60}")


def check_seed(value: object) -> None:
    """Raises ConfigError for a seed that no random generator takes."""
    if not (type(value) is int and 0 <= value < 2**63):
        raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, not {value!r:.60}", field="seed")


def check_every(value: object) -> None:
    """Raises ConfigError for a number of steps between two events that is neither None nor at least 1."""
    if value is not None and not (type(value) is int and value >= 1):
        raise ConfigError(f"every must be a number of steps of at least 1, not {value!r:.60}", field="every")
