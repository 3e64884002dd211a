"""The order of prompts, each as often as it is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class PromptOrder(Sampler[int]):
    """Samples each prompt ``copies`` times in succession, and the prompts of a step as often as it is repeated.

    The last step of an epoch is filled up with the first prompts of the epoch.

    Args:
        count: number of prompts.
        copies: completions of each prompt.
        size: prompts of a step.
        repeats: steps with the same prompts.
        seed: seed of the order; None for that of the rows.
        epoch: returns the number of completed epochs, which changes the order too.
    """

    def __init__(
        self, count: int, *, copies: int, size: int, repeats: int, seed: int | None, epoch: Callable[[], int]
    ) -> None:
        self._count, self._copies, self._size, self._repeats = count, copies, size, repeats
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        return -(-self._count // self._size) * self._size * self._copies * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._count))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed + self._epoch())
            order = torch.randperm(self._count, generator=generator).tolist()
        for first in range(0, self._count, self._size):
            prompts = [order[place % self._count] for place in range(first, first + self._size)]
            for _ in range(self._repeats):
                yield from (prompt for prompt in prompts for _ in range(self._copies))
