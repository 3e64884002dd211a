"""Rows of one batch, each with its own factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.methods.lora.multi_adapter import FactorBank, FactorGroups, Factors, factor_rows
from tests.closeness import assert_close
from tests.tiny_models import adapted

WAYS = [FactorBank, FactorGroups]


def pair(rank: int, scaling: float) -> Factors:
    return torch.randn(rank, 8), torch.randn(6, rank), scaling


def expected(x: Tensor, factors: list[Factors | None], index: Tensor) -> Tensor:
    rows = []
    for row, place in zip(x, index.tolist(), strict=True):
        entry = factors[place] if place >= 0 else None
        rows.append(row.new_zeros(*row.shape[:-1], 6) if entry is None else entry[2] * row @ entry[0].T @ entry[1].T)
    return torch.stack(rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8), (5, 2, 2, 8)])
@pytest.mark.parametrize("index", [[2, 0, -1, 1, 2], [0, 0, 2, 2, 2], [-1, -1, -1, -1, -1], [2, 2, 2, 2, 2]])
def test_each_row_has_its_own_factors(way: type, shape: tuple[int, ...], index: list[int]) -> None:
    x = torch.randn(shape)
    factors = [pair(2, 0.5), None, pair(4, 3.0)]
    places = torch.tensor(index)
    served = way(factors)
    for _ in range(2):
        assert_close(served.delta(x, places), expected(x, factors, places))


@pytest.mark.parametrize("way", WAYS)
def test_another_assignment_is_taken_up(way: type) -> None:
    x = torch.randn(4, 8)
    factors: list[Factors | None] = [pair(2, 1.0), pair(3, 1.0)]
    served = way(factors)
    for index in (torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, -1, 0])):
        assert_close(served.delta(x, index), expected(x, factors, index))


@pytest.mark.parametrize("way", WAYS)
def test_the_product_is_in_the_dtype_of_the_factors(way: type) -> None:
    served = way([pair(2, 1.0)])
    assert served.delta(torch.randn(2, 8, dtype=torch.bfloat16), torch.tensor([0, -1])).dtype == torch.float32


@torch.no_grad()
def test_the_scale_of_an_adapter_multiplies_its_scaling() -> None:
    model: Any = adapted(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], lora_alpha=12)
    base = next(iter(model.manager.layers.values())).base
    adapter = next(iter(model.manager.layers.values())).adapter("default")
    x = torch.randn(3, 8)
    mixed = adapter.mixed([adapter, None, adapter], [0.5, 1.0, 2.0], base, {})
    change = x @ (3.0 * adapter.lora_B @ adapter.lora_A).T
    wanted = torch.tensor([2.0, 0.5, 0.0])[:, None] * change
    assert_close(mixed(x, torch.tensor([2, 0, 1])), wanted)


def test_on_a_cpu_nothing_is_copied() -> None:
    factors = [pair(2, 1.0), pair(3, 1.0)]
    delta = factor_rows(factors, torch.device("cpu"))
    before = delta(torch.ones(2, 8), torch.tensor([0, 1]))
    factors[0][0].zero_()
    after = delta(torch.ones(2, 8), torch.tensor([0, 1]))
    assert not after[0].any() and before[0].any()


def test_factors_of_rows_are_kept_where_they_are_no_larger_than_those_of_two_banks() -> None:
    bank = FactorBank([pair(2, 1.0), pair(4, 1.0)])
    for rows, kept in ((6, True), (7, False)):
        index, x = torch.zeros(rows, dtype=torch.long), torch.randn(rows, 8)
        bank.delta(x, index)
        assert (bank._gathered is not None and bank._gathered[0] is index) == kept
