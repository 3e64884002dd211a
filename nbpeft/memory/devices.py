"""What a device has, what this process takes on it, and its peak since a mark."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device, or None where the system does not tell.

    Attributes:
        total: all there is for this process (a container's limit counts).
        free: what could still be allocated.
        used: what this process takes: for an accelerator what torch allocated, else its resident memory.
    """

    total: int | None
    free: int | None
    used: int | None


def device_memory(device: torch.device) -> DeviceMemory:
    """Total, free and used bytes of a device."""
    if device.type in ("cuda", "xpu"):
        backend: Any = getattr(torch, device.type)
        free, total = backend.mem_get_info(device)
        # What torch keeps cached can be allocated again without asking the driver.
        cached = backend.memory_reserved(device) - backend.memory_allocated(device)
        return DeviceMemory(total, free + cached, backend.memory_allocated(device))
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return DeviceMemory(total, total - torch.mps.driver_allocated_memory(), torch.mps.current_allocated_memory())
    if device.type == "cpu":
        return _host_memory()
    return DeviceMemory(None, None, None)


def placed_on(model: object) -> torch.device | None:
    """Where a model's first parameter lies; None for what has none, such as a config or a name."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), None)


def is_cpu(device: object) -> bool:
    """Whether a device, or the name of one, is a CPU."""
    return str(device).partition(":")[0] == "cpu"


def join(memories: Iterable[DeviceMemory]) -> DeviceMemory:
    """The sum over several devices; None where one of them is unknown."""
    parts = list(memories)
    columns = zip(*((part.total, part.free, part.used) for part in parts), strict=True)
    sums = [None if None in column else sum(value for value in column if value is not None) for column in columns]
    return DeviceMemory(*sums) if sums else DeviceMemory(None, None, None)


def mark_peak(device: torch.device) -> None:
    """Starts counting the peak anew."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):
            (_PROC / "self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Highest use by this process since the last mark, in bytes; None where it is not counted.

    On a CPU this is the resident memory of the whole process; where the system cannot start
    counting anew (anything but Linux) it is the peak since the process began.
    """
    if device.type in ("cuda", "xpu"):
        allocated: int = getattr(torch, device.type).max_memory_allocated(device)
        return allocated
    if device.type == "cpu":
        return _status("VmHWM") or _lifetime_peak()
    return None


def _host_memory() -> DeviceMemory:
    if _PROC.joinpath("meminfo").exists():
        return _linux_memory()
    if sys.platform == "win32":
        return _windows_memory()
    return _other_memory()


def _linux_memory() -> DeviceMemory:
    fields = dict(line.split(":", 1) for line in (_PROC / "meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, taken = _container_limit()
    if limit is not None and limit < total:
        total = limit
        free = min(free, max(limit - taken, 0))
    return DeviceMemory(total, free, _status("VmRSS"))


def _container_limit() -> tuple[int | None, int]:
    """The control group's limit, if it has one, and what is taken of it (file cache left out)."""
    for limit, current, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            value = int((_CGROUP / limit).read_text())
            statistics = (_CGROUP / limit).with_name("memory.stat").read_text().split()
            cache = int(statistics[statistics.index(inactive) + 1])
            return value, int((_CGROUP / current).read_text()) - cache
        except (OSError, ValueError):
            continue
    return None, 0


def _status(name: str) -> int | None:
    """A field of ``/proc/self/status`` in bytes."""
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


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        ("total", ctypes.c_ulonglong),
        ("available", ctypes.c_ulonglong),
        ("others", ctypes.c_ulonglong * 5),
    )


def _windows_memory() -> DeviceMemory:
    status: Any = _MemoryStatus()
    status.length = ctypes.sizeof(_MemoryStatus)
    if not getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # noqa: B009
        return DeviceMemory(None, None, None)
    return DeviceMemory(status.total, status.available, _resident_by_psutil())


def _other_memory() -> DeviceMemory:
    psutil = _psutil()
    if psutil is not None:
        memory = psutil.virtual_memory()
        return DeviceMemory(memory.total, memory.available, _resident_by_psutil())
    try:
        return DeviceMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None, None)
    except (ValueError, OSError, AttributeError):
        return DeviceMemory(None, None, None)


def _resident_by_psutil() -> int | None:
    psutil = _psutil()
    return None if psutil is None else int(psutil.Process().memory_info().rss)


def _psutil() -> Any:
    """The psutil module where it is installed; nothing needs it on Linux."""
    try:
        return importlib.import_module("psutil")
    except ImportError:
        return None
