"""Arithmetic in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nbpeft.engine.kernels.numerics import add_scaled_, is_finite, stamp


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_factor_beyond_the_range_of_a_dtype_gives_infinite_numbers(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, dtype=dtype)
    add_scaled_(weight, torch.tensor([0.25, -0.25], dtype=dtype), 3.0)
    assert weight.tolist() == [0.75, -0.75]
    beyond = min(float(torch.finfo(dtype).max) * 4, 1e308)
    add_scaled_(weight, torch.tensor([8.0, -8.0], dtype=dtype), beyond)
    assert weight.tolist() == [float("inf"), float("-inf")]


def test_a_stamp_that_looks_at_values_sees_each_of_them_change() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    for place in range(6):
        before = stamp(tensor, deep=True)
        assert stamp(tensor, deep=True) == before
        tensor.data.view(-1)[place] += 1.0
        assert stamp(tensor, deep=True) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_looking_for_what_is_not_finite_copies_nothing(dtype: torch.dtype) -> None:
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            copied.extend([str(function)] if "copy" in str(function) else [])
            return function(*args, **(kwargs or {}))

    whole, broken = torch.ones(4, dtype=dtype), torch.tensor([1.0, float("inf")], dtype=dtype)
    with Copies():
        assert is_finite(whole) and not is_finite(broken)
    assert copied == []
