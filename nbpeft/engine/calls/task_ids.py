"""``task_ids``: an argument of a call that says which task each row is of, for methods that learn several together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.storage import loaded
from nbpeft.errors import AdapterError

TASK_IDS = "task_ids"


def checked_task_ids(ids: Any, count: int) -> Tensor:
    """The task of each row, (rows,) int64; (1,) for all rows where there is one task and no number is given.

    Args:
        ids: what a call was given, or None.
        count: how many tasks there are.

    Raises:
        AdapterError: it does not say for each row which of the tasks it is of.
    """
    if ids is None and count == 1:
        return torch.zeros(1, dtype=torch.long)
    if not isinstance(ids, Tensor):
        raise AdapterError(
            f"{TASK_IDS} cannot be None: say which task each row is of, as {TASK_IDS}=torch.tensor([0, …])"
        )
    without_data = isinstance(ids, loaded("torch._subclasses.fake_tensor", "FakeTensor"))  # in a forecast
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 1 or not whole or not (without_data or bool(((ids >= 0) & (ids < count)).all())):
        raise AdapterError(
            f"{TASK_IDS} must be one number for each row, from 0 to {count - 1}, not {ids.tolist()!s:.60}"
        )
    return ids.long()
