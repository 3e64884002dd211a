"""The host memory available to this process; respects a container's limit. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int]:
    """Returns the total memory in bytes, and the bytes that could still be allocated."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit, used = _container_limit()
    if limit is not None and limit < total:
        return limit, min(free, max(limit - used, 0))
    return total, free


def _container_limit() -> tuple[int | None, int]:
    """Returns the control group's limit in bytes, or None, and the bytes used (without inactive file cache)."""
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
