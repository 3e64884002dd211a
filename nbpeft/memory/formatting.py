"""Sizes as text."""

from __future__ import annotations


def size_text(byte_count: float) -> str:
    """Return a size as text in decimal units: ``512 B``, ``68.2 MB``, ``1.25 GB``."""
    value = float(byte_count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
