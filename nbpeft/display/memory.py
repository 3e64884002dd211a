"""Memory in words and as a bar."""

from __future__ import annotations

from nbpeft.display.blocks import Bar
from nbpeft.display.numbers import size
from nbpeft.state import MemoryPart, MemoryState


def part_words(part: MemoryPart) -> str:
    """``optimizer 37.0 MB: two moments a parameter``."""
    return f"{part.name} {size(part.byte_count)}" + (f": {part.detail}" if part.detail else "")


def parts_text(parts: tuple[MemoryPart, ...]) -> str:
    """``base weights 269.0 MB, adapters 22.0 MB``."""
    return ", ".join(f"{part.name} {size(part.byte_count)}" for part in parts if part.byte_count) or "nothing measured"


def scale_of(used: int, total: int | None) -> int | None:
    """The device's size where parts on it are large enough to be seen; else None, and they fill the bar."""
    return total if total is not None and used >= total / 20 else None


def memory_bar(memory: MemoryState, *, thin: bool = False) -> Bar:
    """What a model uses, what others use, and what is free on the device.

    Args:
        memory: as measured.
        thin: for a bar that is there beside other things.
    """
    parts, used = memory.parts, sum(part.byte_count for part in memory.parts)
    total = scale_of(used, memory.device_total)
    whole = max(total or 0, used) or 1
    if total is not None and memory.device_free is not None:
        elsewhere = whole - used - memory.device_free
        if elsewhere > whole / 200:
            parts = (*parts, MemoryPart("elsewhere", elsewhere, "other programs and the system"))
    peak = f"peak {size(memory.peak)} · " if memory.peak is not None else ""
    free = free_words(memory)
    note = f"{peak}{free} on {memory.device}" if free else f"{peak}on {memory.device}"
    return Bar(parts, whole, note=note, thin=thin)


def free_words(memory: MemoryState) -> str:
    """``free 131.0 MB of 582.0 MB``; empty where it is not known."""
    if memory.device_free is None or memory.device_total is None:
        return ""
    return f"free {size(memory.device_free)} of {size(memory.device_total)}"
