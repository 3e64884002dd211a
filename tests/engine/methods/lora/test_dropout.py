"""Dropout with a compact mask drops what torch's does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.methods.lora.dropout import Dropout, KeepMask, lean_dropout


@pytest.mark.parametrize("shape", [(63,), (4, 16), (101, 40)])
def test_a_mask_is_stored_as_bits_and_made_again(shape: tuple[int, ...]) -> None:
    keep, mask = KeepMask.drawn(torch.empty(shape), 0.3)
    assert torch.equal(keep.again(), mask) and set(mask.unique().tolist()) == {0, 1}
    assert keep.stored.nbytes == -(-mask.numel() // 64) * 8
    assert keep.scale == 1 / (1 - 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_a_seed_drops_what_it_drops_in_torch(dtype: torch.dtype) -> None:
    x, dropout = torch.randn(30, 7).to(dtype).requires_grad_(), Dropout(0.3, True)
    found = []
    for drop in (lambda: lean_dropout(x, dropout), lambda: F.dropout(x, 0.3)):
        torch.manual_seed(1)
        dropped = drop()
        state = torch.get_rng_state()
        found.append((dropped, *torch.autograd.grad(dropped.sum(), x), state))
    for own, wanted in zip(*found, strict=True):
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_so_it_does_in_the_memory_order_of_a_dense_input(order: tuple[int, ...]) -> None:
    x, found = torch.randn(5, 6, 7).permute(order).requires_grad_(), list[Tensor]()
    for drop in (lambda: lean_dropout(x, Dropout(0.3, True)), lambda: F.dropout(x, 0.3)):
        torch.manual_seed(1)
        dropped = drop()
        found += [dropped, *torch.autograd.grad(dropped.square().sum(), x)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_different_calls_draw_different_masks_and_a_seed_the_same() -> None:
    x = torch.ones(50, 40)
    dropout = Dropout(0.5, True)
    torch.manual_seed(1)
    first, second = lean_dropout(x, dropout), lean_dropout(x, dropout)
    torch.manual_seed(1)
    assert torch.equal(first, lean_dropout(x, dropout)) and not torch.equal(first, second)
    assert lean_dropout(x, Dropout(0.5, False)) is x
