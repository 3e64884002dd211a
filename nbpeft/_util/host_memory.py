"""How much memory the machine has for this process; a container's limit counts. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int]:
    """Bytes of the memory: all there is, and what could still be allocated."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit, taken = _container_limit()
    if limit is not None and limit < total:
        return limit, min(free, max(limit - taken, 0))
    return total, free


def _container_limit() -> tuple[int | None, int]:
    """Returns the control group's limit, if it has one, and what is taken of it (file cache left out)."""
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
