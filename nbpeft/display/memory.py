"""Memory as text and as a bar."""

from __future__ import annotations

from nbpeft.display.blocks import Bar
from nbpeft.display.numbers import size
from nbpeft.state import MemoryPart, MemoryState

OTHER = "other"
"""Name of the part of memory that does not belong to the model."""
_LABELS = {"temporary": "temporary buffers", "elsewhere": "other programs"}


def label(name: str) -> str:
    """Returns the display name of a part of memory."""
    return _LABELS.get(name, name)


def part_message(part: MemoryPart) -> str:
    """Returns a part as text: ``optimizer 37.0 MB: two moments a parameter``."""
    return f"{label(part.name)} {size(part.byte_count)}" + (f": {part.detail}" if part.detail else "")


def parts_text(parts: tuple[MemoryPart, ...]) -> str:
    """Returns the parts as text: ``base weights 269.0 MB, adapters 22.0 MB``."""
    return (
        ", ".join(f"{label(part.name)} {size(part.byte_count)}" for part in parts if part.byte_count)
        or "nothing measured"
    )


def scale_of(used: int, total: int | None) -> int | None:
    """Returns the number of bytes at the full width of a memory bar.

    Args:
        used: bytes of all parts.
        total: memory of the device in bytes, or None.

    Returns:
        The device's memory if the parts take at least 5 % of it; else None: the parts fill the bar.
    """
    return total if total is not None and used >= total / 20 else None


def memory_bar(memory: MemoryState, *, thin: bool = False) -> Bar:
    """Returns a bar of a model's memory by part, with a note about other memory of the process and free memory.

    The full width is the device's memory if the model's parts are large enough to be seen on it. Otherwise the parts
    of the model fill the bar, because the memory of Python and its libraries would hide a small model.
    """
    parts = tuple(part for part in memory.parts if part.name != OTHER)
    others = tuple(part for part in memory.parts if part.name == OTHER and part.byte_count)
    used = sum(part.byte_count for part in parts)
    total = scale_of(used, memory.device_total)
    if total is not None:
        parts, others = (*parts, *others), ()
        used = sum(part.byte_count for part in parts)
        elsewhere = 0 if memory.device_free is None else total - used - memory.device_free
        if elsewhere > total / 200:
            parts = (*parts, MemoryPart("elsewhere", elsewhere, "other programs and the system"))
    note = (
        *map(part_message, others),
        f"peak {size(memory.peak)}" if memory.peak is not None else "",
        f"{free_words(memory) or 'memory'} on {memory.device}",
    )
    return Bar(parts, max(total or 0, used) or 1, note=", ".join(filter(None, note)), thin=thin)


def free_words(memory: MemoryState) -> str:
    """Returns the free memory as text: ``free 131.0 MB of 582.0 MB``; empty if it is unknown."""
    if memory.device_free is None or memory.device_total is None:
        return ""
    return f"free {size(memory.device_free)} of {size(memory.device_total)}"
