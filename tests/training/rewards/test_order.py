"""The order of prompts of a training with rewards."""

from __future__ import annotations

import pytest

from nbpeft.training.rewards.order import PromptOrder


def order(count: int, *, copies: int = 2, size: int = 2, repeats: int = 1, seed: int | None = None) -> list[int]:
    found = PromptOrder(count, copies=copies, size=size, repeats=repeats, seed=seed, epoch=lambda: 0)
    numbers = list(found)
    assert len(numbers) == len(found)
    return numbers


def test_each_prompt_comes_as_often_as_it_is_completed() -> None:
    assert order(4, copies=3) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_prompts_of_a_step_are_repeated_together() -> None:
    assert order(4, repeats=2) == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 0, 1, 1, 2, 2, 0, 0]), (1, [0, 0, 0, 0])])
def test_the_last_step_is_filled_up_with_the_first_prompts(count: int, expected: list[int]) -> None:
    assert order(count) == expected


def test_an_order_is_drawn_by_seed_and_epoch() -> None:
    epochs = iter((0, 0, 1))
    shuffled = PromptOrder(20, copies=1, size=1, repeats=1, seed=3, epoch=lambda: next(epochs))
    first, again, second = list(shuffled), list(shuffled), list(shuffled)
    assert first == again != second and sorted(first) == sorted(second) == list(range(20))
    assert order(20, copies=1, seed=4) != first
