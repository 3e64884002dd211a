"""Fields that the configs of several methods have."""

from __future__ import annotations

from typing import Any

import peft
import pytest

import nbpeft


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
def test_rank_and_alpha_start_as_in_peft(name: str) -> None:
    ours, theirs = (getattr(library, name)() for library in (nbpeft, peft))
    for field in ("r", "alpha", "rank_pattern", "alpha_pattern"):
        found: Any = getattr(ours, field)
        assert found == getattr(theirs, field), field
