"""The loss of a mixed batch, member by member."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PLACE = "_loss_function"
"""Where a transformers model keeps a loss function that was set on it."""


class NotApartError(Exception):
    """The loss of a model cannot be taken apart by rows."""


class SplitLoss:
    """Stands in for a model's loss function: one loss for each member, and their sum for backward.

    A member's loss is that of its rows alone, normalized as if there were no others; the gradient of the sum is for
    each adapter that of its own loss, since no other depends on it.

    Args:
        function: the model's.
        members: how many there are, each with as many neighbouring rows.
        rows: of all of them.

    Attributes:
        losses: of each, detached; empty until it was called.
        total: their sum, detached.
    """

    def __init__(self, function: Callable[..., Tensor], members: int, rows: int) -> None:
        self._function, self._members, self._rows = function, members, rows
        self.losses: list[Tensor] = []
        self.total: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The sum; see the model's own for the arguments."""
        size = self._rows // self._members
        losses = []
        for member in range(self._members):
            part = slice(member * size, (member + 1) * size)
            own = [self._part(value, part) for value in args]
            losses.append(self._function(*own, **{name: self._part(value, part) for name, value in kwargs.items()}))
        total = torch.stack(losses).sum()
        self.losses, self.total = [loss.detach() for loss in losses], total.detach()
        return total

    def _part(self, value: Any, part: slice) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self._rows
        return value[part] if whole else value

    def check(self, loss: Tensor) -> None:
        """Refuses a loss that is not the sum alone.

        Raises:
            NotApartError: the model computes its loss elsewhere, or adds to it what the rows have in common.
        """
        if self.total is None or not torch.allclose(loss.detach(), self.total, rtol=1e-4, equal_nan=True):
            raise NotApartError


@contextmanager
def split_loss(base: nn.Module, members: int, inputs: Mapping[str, Any]) -> Iterator[SplitLoss]:
    """Context manager: the loss function of ``base`` is taken apart for the calls inside.

    Args:
        base: a transformers model.
        members: how many share the batch.
        inputs: the batch.

    Raises:
        NotApartError: it has no loss function of its own that could be replaced.
    """
    if not isinstance(getattr(type(base), "loss_function", None), property):
        raise NotApartError
    held: Any = base
    before = getattr(base, _PLACE, None)
    split = SplitLoss(held.loss_function, members, len(next(iter(inputs.values()))))
    held.loss_function = split
    try:
        yield split
    finally:
        delattr(base, _PLACE)
        if before is not None:
            held.loss_function = before
