"""Copies that are only kept in case something goes wrong: in memory, or on disk where that is short."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from nbpeft.host_memory import host_memory

_SPARE = 0.1
"""Share of the machine's memory that such copies leave free."""


def spooled(tensor: Tensor) -> Tensor:
    """A tensor on the CPU as it is, or the same in a file without a name, which goes with its last reference.

    Merging a whole model keeps what every weight was until it is done. A model on a GPU can be larger than
    the memory beside it.

    Args:
        tensor: any shape and dtype, on the CPU.
    """
    total, free = host_memory()
    if free > _SPARE * total or os.name != "posix" or not tensor.numel():
        return tensor
    try:
        with tempfile.NamedTemporaryFile(prefix="nbpeft-") as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is told here, not by a signal
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError:
        return tensor
    return mapped.view(tensor.shape).copy_(tensor)
