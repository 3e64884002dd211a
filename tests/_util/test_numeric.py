"""Tests of ``nbpeft._util.numeric``."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nbpeft._util.mixtures import mixture
from nbpeft._util.numeric import is_finite_number
from nbpeft.engine.contract.combination import check_weights
from nbpeft.errors import AdapterError, ConfigError, TrainingError
from nbpeft.training.data.row import Row


@pytest.mark.parametrize("value", [0, -3, 2.5, 1e308])
def test_finite_numbers(value: object) -> None:
    assert is_finite_number(value)


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, 10**400])
def test_other_values(value: object) -> None:
    assert not is_finite_number(value)


def test_a_number_too_large_for_a_float_is_refused(value: Any = 10**400) -> None:
    with pytest.raises(ConfigError, match="must be a number greater than 0"):
        mixture(([{"text": "a"}], 1), ([{"text": "b"}], value))
    with pytest.raises(TrainingError, match="expected a number of at least 0"):
        Row({"weight": value}, 0).weight()
    with pytest.raises(AdapterError, match="expected a finite number"):
        check_weights(["a"], [value])
