"""``task_ids``: a call argument with the task of each row, for methods that train several tasks together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.storage import loaded
from nbpeft.errors import AdapterError

TASK_IDS = "task_ids"


def checked_task_ids(ids: Any, count: int) -> Tensor:
    """Checks the ``task_ids`` of a call.

    Args:
        ids: the argument; None is valid if there is only one task.
        count: number of tasks.

    Returns:
        The task of each row, int64 (rows,), or (1,) for None.

    Raises:
        AdapterError: it is not a vector of task indices.
    """
    if ids is None and count == 1:
        return torch.zeros(1, dtype=torch.long)
    if not isinstance(ids, Tensor):
        raise AdapterError(
            f"{TASK_IDS} cannot be None: pass the task of each row, e.g. {TASK_IDS}=torch.tensor([0, …])"
        )
    without_data = isinstance(ids, loaded("torch._subclasses.fake_tensor", "FakeTensor"))  # in memory forecasts
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 1 or not is_integer or not (without_data or bool(((ids >= 0) & (ids < count)).all())):
        raise AdapterError(
            f"{TASK_IDS} must be one number for each row, from 0 to {count - 1}, not {ids.tolist()!s:.60}"
        )
    return ids.long()
