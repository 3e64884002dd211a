"""Memory in words and as a bar."""

from __future__ import annotations

from nbpeft.display.blocks import Bar
from nbpeft.display.numbers import size
from nbpeft.state import MemoryPart, MemoryState

OTHER = "other"
"""The part of memory that is not the model's."""
_LABELS = {"temporary": "temporary buffers", "elsewhere": "other programs"}


def label(name: str) -> str:
    """Returns how a person calls a part of memory."""
    return _LABELS.get(name, name)


def part_message(part: MemoryPart) -> str:
    """``optimizer 37.0 MB: two moments a parameter``."""
    return f"{label(part.name)} {size(part.byte_count)}" + (f": {part.detail}" if part.detail else "")


def parts_text(parts: tuple[MemoryPart, ...]) -> str:
    """``base weights 269.0 MB, adapters 22.0 MB``."""
    return (
        ", ".join(f"{label(part.name)} {size(part.byte_count)}" for part in parts if part.byte_count)
        or "nothing measured"
    )


def scale_of(used: int, total: int | None) -> int | None:
    """Returns the device's size where parts on it are large enough to be seen; else None, and they fill the bar."""
    return total if total is not None and used >= total / 20 else None


def memory_bar(memory: MemoryState, *, thin: bool = False) -> Bar:
    """Returns what a model uses by part; beside it what else the process uses, and what is free on the device.

    The bar is the device where the model's parts are large enough on it to be seen, else the parts fill it: what
    Python and its libraries take would hide a small model.

    Args:
        memory: as measured.
        thin: for a bar that is there beside other things.
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
    words = (
        *map(part_message, others),
        f"peak {size(memory.peak)}" if memory.peak is not None else "",
        f"{free_words(memory) or 'memory'} on {memory.device}",
    )
    return Bar(parts, max(total or 0, used) or 1, note=", ".join(word for word in words if word), thin=thin)


def free_words(memory: MemoryState) -> str:
    """``free 131.0 MB of 582.0 MB``; empty where it is not known."""
    if memory.device_free is None or memory.device_total is None:
        return ""
    return f"free {size(memory.device_free)} of {size(memory.device_total)}"
