"""A cache that contains a second one: what changes its rows changes those of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nbpeft.engine.calls.two_pass_cache import TwoPassCache


@pytest.mark.parametrize(
    ("command", "values", "rows"),
    [
        ("batch_repeat_interleave", (2,), [0.0, 0.0, 1.0, 1.0]),
        ("batch_select_indices", (torch.tensor([1]),), [1.0]),
        ("reorder_cache", (torch.tensor([1, 0]),), [1.0, 0.0]),
    ],
)
def test_rows_change_in_both(command: str, values: tuple[Any, ...], rows: list[float]) -> None:
    cache = TwoPassCache()
    cache.first_pass = DynamicCache()
    for one in (cache, cache.first_pass):
        states = torch.arange(2.0).view(2, 1, 1, 1)
        one.update(states, states, 0)
    getattr(cache, command)(*values)
    for one in (cache, cache.first_pass):
        assert one.layers[0].keys.flatten().tolist() == rows
