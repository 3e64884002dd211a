"""The loss of a mixed batch, member by member."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.training.transformers.trainer import part_of_step

_PLACE = "_loss_function"
"""Attribute of a transformers model that overrides its loss function."""


class NotSplittableError(Exception):
    """The loss of a model cannot be computed separately for groups of rows."""


class SplitLoss:
    """Replaces a model's loss function: computes one loss per member, and returns their sum for backward.

    A member's loss is that of its own rows, normalized as if there were no others. The gradient of the sum for each
    adapter is that of its own loss, because the other losses do not depend on it.

    Args:
        function: the model's loss function.
        members: number of members.
        rows: number of rows of all members.
        share: share of the batch in its step, by which each loss is multiplied; None for 1.

    Attributes:
        losses: loss of each member, detached; empty before the first call.
        total: their sum, detached.
    """

    def __init__(self, function: Callable[..., Tensor], members: int, rows: int, share: Tensor | None = None) -> None:
        self._function, self._members, self._rows, self._share = function, members, rows, share
        self.losses: list[Tensor] = []
        self.total: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the sum; the arguments are those of the model's loss function."""
        size = self._rows // self._members
        losses = []
        for member in range(self._members):
            part = slice(member * size, (member + 1) * size)
            own = [self._part(value, part) for value in args]
            loss = self._function(*own, **{name: self._part(value, part) for name, value in kwargs.items()})
            losses.append(loss if self._share is None else part_of_step(loss, self._share))
        total = torch.stack(losses).sum()
        self.losses, self.total = [loss.detach() for loss in losses], total.detach()
        return total

    def _part(self, value: Any, part: slice) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self._rows
        return value[part] if whole else value

    def check(self, loss: Tensor) -> None:
        """Refuses a loss that differs from the sum.

        Raises:
            NotSplittableError: the model computes its loss elsewhere, or adds terms that depend on all rows.
        """
        if self.total is None or not torch.allclose(loss.detach(), self.total, rtol=1e-4, equal_nan=True):
            raise NotSplittableError


@contextmanager
def split_loss(
    base: nn.Module, members: int, inputs: Mapping[str, Any], share: Tensor | None = None
) -> Iterator[SplitLoss]:
    """Context manager: computes the loss of ``base`` separately per member, times its share, in the calls inside.

    Raises:
        NotSplittableError: the model has no loss function that can be replaced.
    """
    if not isinstance(getattr(type(base), "loss_function", None), property):
        raise NotSplittableError
    model: Any = base
    before = getattr(base, _PLACE, None)
    split = SplitLoss(model.loss_function, members, len(next(iter(inputs.values()))), share)
    model.loss_function = split
    try:
        yield split
    finally:
        delattr(base, _PLACE)
        if before is not None:
            model.loss_function = before
