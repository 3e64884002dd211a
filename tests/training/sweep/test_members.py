"""What a sweep tells of its members."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import SchedulerType

from nbpeft.training.sweep.members import setting_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (8, "8"),
        (2e-4, "2e-4"),
        (SchedulerType.COSINE, "cosine"),
        (["v_proj", "q_proj"], "q_proj, v_proj"),
        (None, "None"),
    ],
)
def test_settings_in_words(value: Any, text: str) -> None:
    assert setting_text(value) == text
