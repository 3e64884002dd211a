"""Jumping over random numbers leaves the generator where drawing them does."""

from __future__ import annotations

import pytest
import torch

from nbpeft.engine.changes.mersenne_twister import advanced
from nbpeft.engine.changes.random_numbers import skip_words


def drawn(generator: torch.Generator, count: int) -> torch.Tensor:
    """The state of a generator after it has drawn so many words."""
    torch.empty(count, dtype=torch.uint8).random_(generator=generator)
    return generator.get_state()


@pytest.mark.parametrize("before", [0, 10, 623, 624, 5000])
def test_a_jump_leaves_the_state_that_drawing_leaves(before: int) -> None:
    for count in (1, 613, 614, 615, 623, 624, 625, 1248, 20_000, 20_592, 21_000, 100_003, 1_000_001):
        generator = torch.Generator().manual_seed(before + count)
        start = drawn(generator, before)
        assert torch.equal(advanced(start, count), drawn(generator, count))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_many_words_are_jumped_over(device: str) -> None:
    count = (1 << 23) + 5
    torch.manual_seed(4)
    wanted = drawn(torch.default_generator, count)
    torch.manual_seed(4)
    with torch.device(device):
        skip_words(count)
    assert torch.equal(torch.get_rng_state(), wanted)


def test_what_normal_numbers_keep_stays() -> None:
    """A normal number that was computed and not returned yet is part of the state."""
    torch.manual_seed(4)
    torch.randn(1)
    start = torch.get_rng_state()
    torch.empty(700, dtype=torch.uint8).random_()
    assert torch.equal(advanced(start, 700), torch.get_rng_state())
