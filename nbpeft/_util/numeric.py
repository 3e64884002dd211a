"""Checks of numbers that a user gave."""

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


def check_sampling(temperature: object, top_p: object, seed: object) -> None:
    """Checks how tokens are sampled.

    Args:
        temperature: divisor of the logits; 0 is greedy. None if it is not given.
        top_p: total probability of the most likely tokens that are sampled from; None if it is not given.
        seed: seed of the random numbers; None if it is not given.

    Raises:
        ConfigError: a value is invalid.
    """
    if temperature is not None and not (is_finite_number(temperature) and temperature >= 0):
        raise ConfigError(f"temperature must be a number of at least 0, not {temperature!r:.60}", field="temperature")
    if top_p is not None and not (is_finite_number(top_p) and 0 < top_p <= 1):
        raise ConfigError(f"top_p must be above 0 and at most 1, not {top_p!r:.60}", field="top_p")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed!r:.60}", field="seed")
