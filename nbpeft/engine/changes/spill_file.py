"""Backups of weights for the case of a failure: in memory while there is plenty of it, else on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nbpeft._util.host_memory import host_memory

_LEFT_FREE = 0.25
"""Share of the host memory that stays free; backups that would need it are written to disk."""
_BLOCK = 1 << 26
"""Bytes of memory or disk space that are reserved at once, because large pages take less time than many small ones."""
_ALIGNMENT = 64


class SpillFile:
    """Stores copies of tensors in memory, and those that do not fit in one unnamed temporary file.

    Both disappear with this object.
    """

    def __init__(self) -> None:
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._file: IO[bytes] | None = None
        self._size = self._reserved = 0

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Copies a tensor to memory, or to the file if too little memory would be left.

        Args:
            tensor: any shape, dtype and device.

        Returns:
            A function that returns the copy, on the CPU.
        """
        if not tensor.nbytes:
            return tensor.detach().cpu
        place = self._in_memory(tensor.nbytes)
        if place is None:
            try:
                return self._write(tensor)
            except OSError:  # the disk is full
                place = np.empty(tensor.nbytes, np.uint8)
        copied = torch.from_numpy(place).view(tensor.dtype).view(tensor.shape)
        copied.copy_(tensor.detach())
        return lambda: copied

    def close(self) -> None:
        """Frees the disk space; copies that are still in use stay readable."""
        if self._file is not None:
            self._file.close()

    def _in_memory(self, size: int) -> NDArray[np.uint8] | None:
        """The next part of a block of memory, or None if too little memory would be left.

        numpy asks the system for large pages, which torch does not: filling a new block takes a quarter of the time.
        """
        if size > self._block.nbytes:
            total, free = host_memory()
            if free - size < _LEFT_FREE * total:
                return None
            try:
                self._block = np.empty(max(size, _BLOCK), np.uint8)
            except MemoryError:
                return None
        place, self._block = self._block[:size], self._block[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return place

    def _write(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="nbpeft-", buffering=0)  # noqa: SIM115
        file, start, shape, dtype = self._file, self._size, tensor.shape, tensor.dtype
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        count = plain.numel()
        if start + count > self._reserved and hasattr(os, "posix_fallocate"):
            with suppress(OSError):  # the file system cannot reserve space, or has too little
                os.posix_fallocate(file.fileno(), start, max(count, _BLOCK))
                self._reserved = start + max(count, _BLOCK)
        rest = memoryview(plain.numpy().data)
        file.seek(start)
        while rest:
            rest = rest[file.write(rest) :]
        self._size += count

        def read() -> Tensor:
            # Writable although it is only read: torch warns about arrays that are not.
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", offset=start, shape=(count,))
            return torch.from_numpy(mapped).view(dtype).view(shape)

        return read
