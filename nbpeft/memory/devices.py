"""Total and free memory of a device, what this process uses of it, and the peak since a mark."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from nbpeft._util.device_names import WITHOUT_BFLOAT16, named
from nbpeft._util.host_memory import host_memory

_PROC = Path("/proc")


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device in bytes; None for what the system does not report.

    Attributes:
        total: memory available to this process at most (a container's limit counts).
        free: memory that could still be allocated.
        used: memory used by this process; on an accelerator what torch has allocated, else its resident memory.
    """

    total: int | None
    free: int | None
    used: int | None


def device_memory(device: torch.device) -> DeviceMemory:
    """Return the memory of a device."""
    if device.type in ("cuda", "xpu"):
        backend: Any = getattr(torch, device.type)
        free, total = backend.mem_get_info(device)
        # torch's caching allocator can reuse what it has cached, although the driver reports it as used.
        cached = backend.memory_reserved(device) - backend.memory_allocated(device)
        return DeviceMemory(total, free + cached, backend.memory_allocated(device))
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return DeviceMemory(total, total - torch.mps.driver_allocated_memory(), torch.mps.current_allocated_memory())
    if device.type == "cpu":
        return DeviceMemory(*host_memory(), int(psutil.Process().memory_info().rss))
    return DeviceMemory(None, None, None)


def placed_on(model: object) -> torch.device | None:
    """Return the device of a model's first parameter; None for anything else, such as a config or a name."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), None)


def is_cpu(device: object) -> bool:
    """Return whether a device, or the name of one, is a CPU."""
    return str(device).partition(":")[0] == "cpu"


def has_bfloat16(device: object) -> bool:
    """Return whether a GPU, or a card by its name (``T4``), computes in bfloat16; True for devices of other kinds."""
    text = str(device)
    if (name := named(text)) is not None:
        return name not in WITHOUT_BFLOAT16
    if text.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(torch.device(text))[0] >= 8


def join(memories: Iterable[DeviceMemory]) -> DeviceMemory:
    """Return the sum over several devices; a field is None if one of them does not report it."""
    parts = list(memories)
    columns = zip(*((part.total, part.free, part.used) for part in parts), strict=True)
    sums = [None if None in column else sum(value for value in column if value is not None) for column in columns]
    return DeviceMemory(*sums) if sums else DeviceMemory(None, None, None)


def mark_peak(device: torch.device) -> None:
    """Reset the peak of a device."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):
            (_PROC / "self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes since the last ``mark_peak``; None if it is not counted.

    On a CPU this is the resident memory of the whole process. Systems other than Linux cannot reset it; there it is
    the peak since the process started.
    """
    if device.type in ("cuda", "xpu"):
        allocated: int = getattr(torch, device.type).max_memory_allocated(device)
        return allocated
    if device.type == "cpu":
        return _status("VmHWM") or _lifetime_peak()
    return None


def _status(name: str) -> int | None:
    """Return a field of ``/proc/self/status`` in bytes."""
    try:
        for line in (_PROC / "self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _lifetime_peak() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
