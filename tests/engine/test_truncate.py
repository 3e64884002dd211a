"""Truncation and its loss, for factors that are smaller than their product and for many adapters together."""

from __future__ import annotations

import pytest
import torch

from nbpeft.engine.methods.lora.combining.recipe import Recipe
from nbpeft.engine.methods.lora.combining.truncate import measure_loss, truncate_factors


@pytest.mark.parametrize("total", [3, 6, 20])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_truncation_and_loss_are_those_of_the_delta(total: int, shape: tuple[int, int]) -> None:
    wide_B, wide_A = torch.randn(2, shape[0], total), torch.randn(2, total, shape[1])
    delta = wide_B @ wide_A
    kept_B, kept_A = truncate_factors(wide_B, wide_A, 2, Recipe("svd"))
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    best = (left[..., :2] * values[:, None, :2]) @ right[:, :2]
    kept = kept_B @ kept_A
    assert kept_B.shape == (2, shape[0], 2) and kept_A.shape == (2, 2, shape[1])
    assert torch.allclose(kept, best, atol=1e-4)
    assert torch.allclose(kept_A @ kept_A.mT, torch.eye(2), atol=1e-5)
    loss = measure_loss(wide_B, wide_A, kept_B, kept_A)
    assert loss.true == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert loss.kept == pytest.approx(float(kept.square().sum()), rel=1e-5)
    assert loss.error == pytest.approx(float((delta - kept).square().sum()), rel=1e-4)
