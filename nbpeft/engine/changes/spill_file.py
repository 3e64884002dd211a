"""Backups of weights for the case of a failure: on disk, so that they take no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import IO

import numpy as np
import torch
from torch import Tensor

from nbpeft._util.host_memory import host_memory

_CACHED = 0.05
"""Share of the host memory up to which writes return at once, because the system's file cache absorbs them."""
_PLENTY = 0.25
"""Share of the host memory that must be free to keep further copies in memory; writing them would wait for the disk."""


class SpillFile:
    """Stores copies of tensors in one unnamed temporary file, which disappears with this object."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._size = 0

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Copies a tensor to the file, or to memory if that is faster or the disk is full.

        Args:
            tensor: any shape, dtype and device.

        Returns:
            A function that returns the copy, on the CPU.
        """
        total, free = host_memory()
        cached = self._size + tensor.nbytes <= _CACHED * total
        if tensor.numel() and (cached or free < _PLENTY * total):
            try:
                return self._write(tensor)
            except OSError:  # the disk is full
                pass
        copied = tensor.detach().to("cpu", copy=True)
        return lambda: copied

    def close(self) -> None:
        """Frees the disk space; copies that are still in use stay readable."""
        if self._file is not None:
            self._file.close()

    def _write(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="nbpeft-", buffering=0)  # noqa: SIM115
        file, start, shape, dtype = self._file, self._size, tensor.shape, tensor.dtype
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        rest = memoryview(plain.numpy().data)
        file.seek(start)
        while rest:
            rest = rest[file.write(rest) :]
        count = plain.numel()
        self._size += count

        def read() -> Tensor:
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", offset=start, shape=(count,))
            return torch.from_numpy(mapped).view(dtype).view(shape)

        return read
