"""Rounding so that outputs stay: against rounding each number by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nbpeft.engine.kernels.rounding import Grid, round_with_feedback, share_lost

LEVELS = torch.arange(-8, 8).float()


def grid(weight: Tensor) -> Grid:
    return Grid(LEVELS, weight.abs().amax(1, keepdim=True) / 8, lambda places: places)


def nearest(weight: Tensor, on: Grid) -> Tensor:
    distances = (weight[..., None] / on.scales[..., None] - LEVELS).abs()
    return distances.argmin(-1).to(torch.uint8)


def inputs(rows: int, features: int, *, rank: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, rank) @ torch.randn(rank, features) + 0.1 * torch.randn(rows, features)


@pytest.mark.parametrize("features", [1, 63, 64, 130])
def test_inputs_that_have_nothing_in_common_leave_the_nearest(features: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, features)
    on = grid(weight)
    places = round_with_feedback(weight, torch.eye(features), on)
    assert places.dtype == torch.uint8 and torch.equal(places, nearest(weight, on))


@pytest.mark.parametrize("features", [63, 130])
def test_outputs_change_less_than_by_rounding_to_the_nearest(features: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, features), inputs(400, features, rank=12)
    on = grid(weight)
    errors = [
        float(((on.values(places) - weight) @ x.T).norm())
        for places in (round_with_feedback(weight, x.T @ x, on), nearest(weight, on))
    ]
    assert errors[0] < 0.4 * errors[1]


def test_a_small_change_survives_where_the_nearest_takes_it_back() -> None:
    torch.manual_seed(0)
    on = grid(torch.randn(24, 64))
    frozen = on.values(torch.randint(0, 16, (24, 64), dtype=torch.uint8))
    wanted, x = frozen + 0.2 * on.scales * torch.randn(24, 64).sign(), inputs(400, 64, rank=8)
    gram = x.T @ x
    assert torch.equal(on.values(nearest(wanted, on)), frozen)
    assert share_lost(frozen, wanted, frozen, gram) == pytest.approx(1.0)
    assert share_lost(on.values(round_with_feedback(wanted, gram, on)), wanted, frozen, gram) < 0.4
    assert share_lost(wanted, wanted, frozen, gram) == 0.0 == share_lost(frozen, frozen, frozen, gram)


def test_inputs_never_seen_and_rows_of_zeros_are_no_obstacle() -> None:
    weight = torch.randn(4, 70)
    weight[1] = 0.0
    on = grid(weight)
    assert torch.equal(round_with_feedback(weight, torch.zeros(70, 70), on)[2:], nearest(weight, on)[2:])
